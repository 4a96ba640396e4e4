// Questions: one dialog element, asked with a promise.

import { ApiError, call, get, key, useKey } from './api.js';
import { $, clock, el, t, text, word } from './parts.js';

// Shows the dialog.  `act` is tried when the user agrees; what it throws is shown and the dialog stays.
export function ask({ title, body = [], yes, no = t('cancel'), danger = false, act = async () => {} }) {
  const dialog = $('dialog');
  text($('dialog-title'), title);
  $('dialog-body').replaceChildren(...body);
  text($('dialog-yes'), yes ?? t('close'));
  $('dialog-yes').className = danger ? 'main danger' : 'main';
  $('dialog-no').hidden = !yes;
  text($('dialog-no'), no);
  $('dialog-error').hidden = true;
  return new Promise(resolve => {
    const form = $('dialog-form');
    const finish = value => {
      form.onsubmit = dialog.onclose = $('dialog-no').onclick = null;
      if (dialog.open) dialog.close();
      resolve(value);
    };
    $('dialog-no').onclick = () => finish(false);
    dialog.onclose = () => finish(false);
    form.onsubmit = async event => {
      event.preventDefault();
      $('dialog-yes').disabled = true;
      try {
        await act();
        finish(true);
      } catch (error) {
        text($('dialog-error'), error.message);
        $('dialog-error').hidden = false;
      } finally {
        $('dialog-yes').disabled = false;
      }
    };
    if (!dialog.open) dialog.showModal();
  });
}

// Asks for a key until one is accepted; `check` says whether the page works with it.
export function askKey(check) {
  const input = el('input', { type: 'password', autocomplete: 'current-password', spellcheck: 'false', id: 'key-input' });
  const keep = el('input', { type: 'checkbox' });
  const forget = el('button', { type: 'button', class: 'quiet' }, t('key_forget'));
  const before = key();
  const asked = ask({
    title: t('key_title'), yes: t('key_use'),
    body: [el('p', {}, t('key_why')), el('label', { for: 'key-input' }, t('key_label')), input,
      el('label', { class: 'check' }, keep, ` ${t('key_keep')}`), el('p', { class: 'faint small' }, t('key_keep_why')), before ? forget : null].filter(Boolean),
    act: async () => {
      useKey(input.value.trim(), keep.checked);
      try { await check(); } catch (error) { useKey(before, false); throw error; }
    },
  });
  forget.onclick = () => { useKey('', false); location.reload(); };
  input.focus();
  return asked;
}

export async function askStop(instance, model, { configured }) {
  const force = el('input', { type: 'checkbox' });
  const n = instance.in_flight;
  const loading = ['starting', 'waking', 'backoff'].includes(instance.status);
  return ask({
    title: t('stop_title', { model }), yes: t('stop'), danger: true,
    body: [el('p', {}, loading ? t('stop_loading') : configured ? t('stop_body') : t('stop_gone')),
      n ? el('p', {}, n === 1 ? t('stop_busy_1') : t('stop_busy', { n })) : null,
      n ? el('label', { class: 'check' }, force, ` ${t('force')}`) : null].filter(Boolean),
    act: () => call('DELETE', `/instances/${instance.id}${force.checked ? '?force=1' : ''}`),
  });
}

export async function askSleep(instance, model) {
  if (!instance.in_flight) return call('POST', `/instances/${instance.id}/sleep`, {});
  const n = instance.in_flight;
  return ask({ title: t('sleep_title', { model }), yes: t('sleep'),
    body: [el('p', {}, n === 1 ? t('stop_busy_1') : t('stop_busy', { n })), el('p', {}, t('sleep_body'))],
    act: () => call('POST', `/instances/${instance.id}/sleep`, {}) });
}

const pathOf = name => `/admin/models/${name.split('/').map(encodeURIComponent).join('/')}`;

// Loads a configured model at once, or asks first where others would go for it.
export async function askLoad(name) {
  const load = () => call('POST', `${pathOf(name)}/load`, {});
  const plan = await get(`${pathOf(name)}/plan`).catch(() => null);
  if (!plan || (plan.fits && !plan.sleep.length && !plan.stop.length)) return load();
  const goes = (list, how) => list.map(one => el('li', {}, `${one.model ?? one.id}: ${t(how)}`));
  return ask({
    title: t('load_title', { model: name }), yes: plan.fits ? t('load') : t('load_anyway'), act: load,
    body: plan.fits
      ? [el('p', {}, t('load_makes_room')), el('ul', {}, ...goes(plan.sleep, 'goes_asleep'), ...goes(plan.stop, 'goes_away')),
        plan.seconds_expected ? el('p', { class: 'faint' }, t('about_seconds', { time: clock(plan.seconds_expected) })) : ''].filter(Boolean)
      : [el('p', {}, t('load_no_fit', { why: plan.because }))],
  });
}

export function askCreate() {
  const model = el('input', { required: true, autocomplete: 'off', spellcheck: 'false', placeholder: 'Qwen/Qwen3-0.6B' });
  const params = el('textarea', { rows: 4, spellcheck: 'false', placeholder: 'max_model_len=4096\ngpu_memory_utilization=0.4' });
  const timeout = el('input', { type: 'number', min: 0, step: 1 });
  const field = (label, input) => el('label', {}, el('span', {}, label), input);
  return ask({
    title: t('create_title'), yes: t('load'),
    body: [field(t('create_model'), model), field(t('create_params'), params), field(t('create_timeout'), timeout)],
    act: () => call('POST', '/instances', {
      model_name: model.value.trim(), params: flagsOf(params.value), ...(timeout.value === '' ? {} : { timeout: Number(timeout.value) }) }),
  });
}

// flag=value lines; a value is JSON where it can be read as that, else text.
function flagsOf(lines) {
  const found = {};
  for (const line of lines.split('\n').map(one => one.trim()).filter(Boolean)) {
    const [, name, value] = /^-{0,2}([\w.-]+)\s*=\s*(.*)$/.exec(line) ?? [];
    if (!name) throw new ApiError(t('create_bad_line', { line }));
    try { found[name.replaceAll('-', '_')] = JSON.parse(value); } catch { found[name.replaceAll('-', '_')] = value; }
  }
  return found;
}

export function showDetails(instance) {
  const facts = [
    ['id', instance.id], ['names', [instance.model_name, ...instance.aliases].join(', ')], ['state', word(instance.status)], ['why', instance.why],
    ['because', instance.because], ['port', instance.port], ['pid', instance.pid], ['restarts', instance.restarts],
    ['created', new Date(instance.created * 1000).toLocaleString()],
    ['last_error', instance.last_error?.message], ['suggestion', instance.last_error?.suggestion && JSON.stringify(instance.last_error.suggestion)],
    ['engine', listed(instance.engine)], ['flags', listed(instance.flags)]].filter(([, value]) => value !== null && value !== undefined && value !== '');
  return ask({ title: instance.aliases[0] ?? instance.model_name,
    body: [el('dl', { class: 'facts' }, ...facts.flatMap(([name, value]) => [el('dt', {}, t(name)), el('dd', {}, String(value))]))] });
}

function listed(values) {
  return Object.entries(values ?? {}).map(([name, value]) => `${name} = ${typeof value === 'string' ? value : JSON.stringify(value)}`).join('\n');
}
