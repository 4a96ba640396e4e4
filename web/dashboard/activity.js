// The last requests, and what happened.

import { known, wantRequests } from './live.js';
import { $, attr, DASH, el, keyed, missing, t, text, timeOfDay, took, word } from './parts.js';

const COLUMNS = ['time', 'status', 'model', 'backend', 'path', 'key', 'first_byte', 'whole', 'request_id'];
const SHOWN = 200;

export function start() {
  $('requests-failed').onchange = () => wantRequests($('requests-failed').checked);
  $('requests-filter').oninput = () => renderRequests();
}

export function render(what) {
  if (what !== 'events') renderRequests();
  if (what !== 'requests') renderEvents();
}

function renderRequests() {
  const wanted = $('requests-filter').value.toLowerCase();
  const all = [...known.requests].reverse().filter(one => !wanted
    || [one.model, one.backend, one.path, one.key, one.code, one.status, one.request_id].some(part => String(part ?? '').toLowerCase().includes(wanted)));
  $('requests-none').hidden = all.length > 0;
  text($('requests-about'), all.length ? t('requests_about', { n: all.length }) : '');
  keyed($('requests'), all.slice(0, SHOWN), one => `${one.request_id} ${one.at}`, () => el('tr', {},
    ...COLUMNS.map(name => el('td', { class: ['first_byte', 'whole'].includes(name) ? 'number' : name }))), (item, one) => {
    COLUMNS.forEach((column, n) => attr(item.children[n], 'data-label', t(column)));
    const failed = one.status >= 400 || one.code !== null;
    item.className = failed ? 'is-failed' : '';
    [timeOfDay(one.at), one.code ? `${one.status} ${one.code}` : String(one.status), one.model ?? DASH, one.backend ?? DASH, one.path, one.key ?? DASH,
      took(one.first_byte_s), missing(one.seconds) ? t('under_way') : took(one.seconds), one.request_id].forEach((value, n) => text(item.children[n], value));
  });
}

function renderEvents() {
  $('events-none').hidden = known.events.length > 0;
  keyed($('events'), [...known.events].reverse(), one => one.id, () => el('li', {}, el('time', { class: 'faint' }), el('span', { class: 'dot', 'aria-hidden': 'true' }), el('span', {}), el('span', { class: 'faint small' })), (item, one) => {
    const [time, , what, why] = item.children;
    item.className = `is-${one.to ?? 'starting'}`;
    text(time, timeOfDay(one.at));
    text(what, one.event === 'phase' ? t('event_phase', { model: one.model, phase: word(one.phase) })
      : one.from ? t('event_state', { model: one.model, from: word(one.from), to: word(one.to) }) : t('event_new', { model: one.model, to: word(one.to) }));
    text(why, one.why ?? '');
  });
}
