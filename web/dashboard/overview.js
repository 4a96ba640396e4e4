// The first view: charts, devices, models and their instances, servers.

import { call } from './api.js';
import { chart } from './charts.js';
import { askCreate, askLoad, askSleep, askStop, showDetails } from './dialogs.js';
import { known, nameOf, refreshAll } from './live.js';
import { $, attr, bytes, clock, colourOf, DASH, el, keyed, missing, number, percent, plain, rate, t, text, took, word } from './parts.js';

const charts = [
  chart({ name: 'tokens_s', column: 'tokens_per_s', stacked: true, format: rate, edge: plain }),
  chart({ name: 'requests_s', column: 'requests_per_s', stacked: true, format: rate, edge: plain }),
  chart({ name: 'ttft', column: 'ttft_s', stacked: false, format: took, edge: took })];

let tell = () => {};
let open = () => {};

export function start({ notice, openView }) {
  tell = notice;
  open = openView;
  $('charts').append(...charts);
  $('create').onclick = () => askCreate().then(done => done && refreshAll(true)).catch(() => {});
  setInterval(countDown, 1000);
}

export function render(what) {
  if (['all', 'sample', 'language'].includes(what)) for (const one of charts) one.update(known.history);
  if (what !== 'requests' && what !== 'events') { renderGpus(); renderModels(); renderServers(); }
}

// --- devices -----------------------------------------------------------------------------------------------------

function renderGpus() {
  const { data, driver, cuda } = known.gpus;
  text($('gpus-about'), driver ? t('driver', { driver, cuda: cuda ?? DASH }) : '');
  keyed($('gpus'), data, one => one.index, createGpu, updateGpu);
}

function createGpu() {
  return el('div', { class: 'gpu' },
    el('div', { class: 'gpu-head' }, el('strong', {}), el('span', { class: 'faint' }), el('span', { class: 'faint push number' })),
    el('div', { class: 'memory-bar', role: 'img' }), el('ul', { class: 'legend' }));
}

function updateGpu(item, gpu) {
  const [title, about, free] = item.firstChild.children;
  text(title, gpu.kind === 'host' ? t('host_memory') : `GPU ${gpu.index}`);
  text(about, gpu.error ? t('device_error', { error: gpu.error })
    : [gpu.name, missing(gpu.utilization) ? '' : t('busy', { percent: percent(gpu.utilization) }),
      missing(gpu.temperature_c) ? '' : `${number(gpu.temperature_c)} °C`].filter(Boolean).join(' · '));
  const { total, used, free: left } = gpu.memory;
  text(free, gpu.error ? '' : t('free', { bytes: bytes(left), total: bytes(total) }));
  const shares = sharesOf(gpu);
  const [, bar, legend] = item.children;
  attr(bar, 'aria-label', `${title.textContent}: ${shares.map(one => `${one.label} ${bytes(one.bytes)}`).join(', ')}, ${free.textContent}`);
  keyed(bar, shares, one => one.id, () => el('span', {}), (part, one) => {
    part.className = one.id === 'others' ? 'part others' : `part c${colourOf(one.label)}${one.promised ? ' promised' : ''}`;
    part.style.inlineSize = `${Math.min(100, one.bytes / (total || 1) * 100).toFixed(2)}%`;
    part.title = `${one.label}: ${bytes(one.bytes)}`;
  });
  keyed(legend, shares, one => one.id, () => el('li', {}, el('i', { class: 'swatch' }), el('span', {}), el('b', { class: 'number' })), (entry, one) => {
    entry.firstChild.className = one.id === 'others' ? 'swatch others' : `swatch c${colourOf(one.label)}`;
    text(entry.children[1], one.label);
    text(entry.lastChild, bytes(one.bytes));
  });
}

const othersOn = new Map();     // what other programs held on each device when nothing was loading there

// What an instance was measured to hold; of one that loads, what it was promised: it takes that bit by bit.
function sharesOf(gpu) {
  const here = [...known.instances.values()].filter(one => one.gpus.includes(gpu.index));
  const share = (one, bytesHeld, promised) => ({ id: one.id, label: nameOf(one), bytes: bytesHeld / one.gpus.length, promised });
  const loads = one => ['starting', 'waking'].includes(one.status) && one.memory.planned_bytes;
  const loading = here.filter(loads).map(one => share(one, one.memory.planned_bytes, true));
  const held = here.filter(one => !loads(one) && !['failed', 'backoff'].includes(one.status))
    .map(one => share(one, one.memory.measured_bytes ?? (one.status === 'sleeping' ? 0 : one.memory.planned_bytes ?? 0), false)).filter(one => one.bytes > 0);
  const unexplained = Math.max(0, gpu.memory.used - held.reduce((sum, one) => sum + one.bytes, 0));
  if (!loading.length) othersOn.set(gpu.index, unexplained);
  const others = Math.min(unexplained, othersOn.get(gpu.index) ?? unexplained);
  return [...held, ...(others > gpu.memory.total * 0.002 ? [{ id: 'others', label: t('others'), bytes: others }] : []), ...loading];
}

const memoryOf = one => one.memory.measured_bytes ?? one.memory.planned_bytes ?? 0;

// --- models ------------------------------------------------------------------------------------------------------

const COLUMNS = ['model', 'state', 'device', 'memory', 'in_flight', 'waiting', 'tokens_s', 'ttft', 'cache', 'idle_in', 'actions'];
const NUMBERS = new Set(['memory', 'in_flight', 'waiting', 'tokens_s', 'ttft', 'cache', 'idle_in']);

// An instance each, and a configured model that has none.
function rows() {
  const instances = [...known.instances.values()];
  const found = known.models.flatMap(model => {
    const own = instances.filter(one => one.configured_as === model.id);
    return own.length ? own.map(instance => ({ key: instance.id, model, instance })) : [{ key: `model ${model.id}`, model, instance: null }];
  });
  const configured = new Set(known.models.map(one => one.id));
  return [...found, ...instances.filter(one => !configured.has(one.configured_as)).map(instance => ({ key: instance.id, model: null, instance }))];
}

function renderModels() {
  const all = rows();
  text($('models-about'), all.length ? t('models_about', { ready: all.filter(row => row.instance?.status === 'ready').length, all: all.length }) : '');
  $('models-none').hidden = all.length > 0 || known.refused !== null;
  $('create').hidden = known.refused !== null;
  keyed($('models'), all, row => row.key, createRow, updateRow);
  countDown();
}

function createRow() {
  const made = el('tr', {}, ...COLUMNS.map((name, n) => el(n === 0 ? 'th' : 'td', n === 0 ? { scope: 'row', class: 'model' } : { class: NUMBERS.has(name) ? 'number' : name })));
  made.children[0].append(el('i', { class: 'swatch', 'aria-hidden': 'true' }), el('span', { class: 'names' }, el('button', { type: 'button', class: 'name' }), el('span', { class: 'faint small' })));
  made.children[1].append(el('span', { class: 'state' }, el('span', { class: 'dot', 'aria-hidden': 'true' }), el('span', {})),
    el('div', { class: 'progress', role: 'progressbar', 'aria-valuemin': 0, 'aria-valuemax': 100, hidden: true }, el('span', {})),
    el('span', { class: 'small faint why' }));
  made.children[10].append(el('div', { class: 'row end' }));
  return made;
}

function updateRow(item, { model, instance }) {
  const name = model?.id ?? nameOf(instance);
  const status = instance?.status ?? 'unloaded';
  const cells = item.children;
  COLUMNS.forEach((column, n) => attr(cells[n], 'data-label', t(column)));
  item.className = `is-${status}`;
  cells[0].firstChild.className = `swatch ${instance ? `c${colourOf(nameOf(instance))}` : 'empty'}`;
  const [button, about] = cells[0].lastChild.children;
  text(button, name);
  button.disabled = !instance;
  button.onclick = () => showDetails(instance);
  attr(button, 'aria-label', instance ? t('action_of', { action: t('details'), model: name }) : null);
  const path = model?.model_path ?? instance.model_name;
  text(about, [path !== name ? path : '', instance?.id ?? '', (model?.pinned ?? instance?.pinned) ? t('pinned') : ''].filter(Boolean).join(' · '));
  updateState(cells[1], instance, status, name);
  const load = instance ? known.latest.instances?.[instance.id] ?? instance.load : null;
  const serving = status === 'ready';
  const values = instance ? [
    instance.gpus.length ? instance.gpus.map(gpuName).join(', ') : DASH, bytes(memoryOf(instance) || null), number(instance.in_flight),
    number((serving ? load?.waiting : known.latest.models?.[nameOf(instance)]?.waiting) ?? 0), serving ? rate(load?.tokens_per_s) : DASH,
    serving ? took(load?.ttft_s) : DASH, serving ? percent(load?.cache_usage) : DASH] : [DASH, bytes(model.memory_bytes), DASH, DASH, DASH, DASH, DASH];
  values.forEach((value, n) => { text(cells[n + 2], value); cells[n + 2].classList.toggle('nothing', value === DASH); });
  item.expiry = instance;
  updateActions(cells[10].firstChild, actionsOf(status, model, instance, name), name);
}

function gpuName(index) {
  const found = known.gpus.data.find(one => one.index === index);
  return found?.kind === 'host' ? t('host_memory') : `GPU ${index}`;
}

function updateState(cell, instance, status, name) {
  const [state, progress, why] = cell.children;
  text(state.lastChild, word(status));
  const loading = ['starting', 'waking'].includes(status);
  progress.hidden = !loading || missing(instance.progress);
  if (!progress.hidden) {
    attr(progress, 'aria-valuenow', Math.round(instance.progress * 100));
    attr(progress, 'aria-label', `${name}: ${word(status)}`);
    progress.firstChild.style.inlineSize = `${instance.progress * 100}%`;
  }
  const phase = instance?.phase && instance.phase !== status ? word(instance.phase) : '';
  text(why, loading ? [phase, missing(instance.progress) ? '' : percent(instance.progress)].filter(Boolean).join(' · ')
    : status === 'failed' ? instance.last_error?.message ?? instance.why
      : status === 'backoff' ? [t('retry_in', { time: clock(instance.retry_in ?? 0) }), instance.last_error?.message].filter(Boolean).join(': ')
        : status === 'stopping' && phase ? phase : '');
}

function actionsOf(status, model, instance, name) {
  const stop = { name: 'stop', do: () => askStop(instance, name, { configured: model !== null }) };
  const log = { name: 'log', do: () => open('logs', instance.id) };
  switch (status) {
    case 'unloaded': return [{ name: 'load', main: true, do: () => askLoad(name) }];
    case 'ready': return [{ name: 'chat', do: () => open('playground', name) }, log,
      ...(instance.sleep ? [{ name: 'sleep', do: () => askSleep(instance, name) }] : []), stop];
    case 'sleeping': return [{ name: 'wake', main: true, do: () => call('POST', `/instances/${instance.id}/wake`, {}) }, log, stop];
    case 'failed': return [...(model ? [{ name: 'again', main: true, do: () => askLoad(name) }] : []), log,
      { name: 'dismiss', do: () => call('DELETE', `/instances/${instance.id}`) }];
    case 'starting': case 'backoff': return [log, stop];
    default: return [log];
  }
}

function updateActions(place, actions, model) {
  keyed(place, actions, one => one.name, () => el('button', { type: 'button', class: 'small' }), (button, one) => {
    text(button, t(one.name));
    button.classList.toggle('main', Boolean(one.main));
    attr(button, 'aria-label', t('action_of', { action: t(one.name), model }));
    button.onclick = async () => {
      if (button.ariaBusy === 'true') return;       // disabled, it would lose the focus
      button.ariaBusy = 'true';
      try { await one.do(); await refreshAll(true); } catch (error) {
        tell(t('failed_do', { action: t('action_of', { action: t(one.name), model }), why: error.message }), 'bad');
      } finally { button.ariaBusy = null; }
    };
  });
}

function countDown() {
  for (const item of $('models').children) {
    const one = item.expiry;
    const left = one && !missing(one.expires_in) ? one.expires_in - (one.in_flight ? 0 : (Date.now() - one.seenAt) / 1000) : null;
    const running = one && ['ready', 'sleeping'].includes(one.status);
    text(item.children[9], !running ? DASH : one.in_flight ? t('on_use') : left === null ? t('never') : clock(left));
    item.children[9].classList.toggle('nothing', !running);
  }
}

// --- servers -----------------------------------------------------------------------------------------------------

const SERVER_COLUMNS = ['server', 'health', 'running', 'waiting', 'capacity', 'cache', 'serves'];

function renderServers() {
  const servers = known.servers;
  $('servers-card').hidden = !servers.length;
  text($('servers-about'), t('servers_about', { up: servers.filter(one => one.health === 'up').length, all: servers.length }));
  keyed($('servers'), servers, one => one.id, () => el('tr', {},
    el('th', { scope: 'row' }, el('strong', {}), el('span', { class: 'faint small' })),
    el('td', {}, el('span', { class: 'state' }, el('span', { class: 'dot', 'aria-hidden': 'true' }), el('span', {})), el('span', { class: 'small faint why' })),
    ...SERVER_COLUMNS.slice(2, 6).map(() => el('td', { class: 'number' })), el('td', { class: 'serves' })), (item, one) => {
    SERVER_COLUMNS.forEach((column, n) => attr(item.children[n], 'data-label', t(column)));
    item.className = `is-${one.health}`;
    text(item.children[0].firstChild, one.id);
    text(item.children[0].lastChild, one.url);
    text(item.children[1].firstChild.lastChild, word(one.health));
    text(item.children[1].lastChild, one.health === 'up' ? '' : one.why ?? '');
    [number(one.running), number(one.waiting), number(one.capacity), percent(one.cache_usage), one.models.join(', ') || DASH]
      .forEach((value, n) => text(item.children[n + 2], value));
  });
}
