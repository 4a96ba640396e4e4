// An engine's log: the last lines, what comes after them, and what is searched for.

import { pieces } from './api.js';
import { known, nameOf } from './live.js';
import { $, el, keyed, t, text, word } from './parts.js';

const TAIL = 1000;
const KEPT = 5000;              // lines on the page; the oldest go
const DRAWN_MS = 100;

let lines = [];
let open = null;                // {id, aborter}
let rest = '';
let ended = '';
let visible = false;
let timer = null;

export function start() {
  $('log-form').onsubmit = event => event.preventDefault();
  $('log-instance').onchange = () => read($('log-instance').value);
  $('log-follow').onchange = () => read($('log-instance').value, true);
  $('log-search').oninput = $('log-only').onchange = () => redraw();
  $('log-wrap').onchange = () => $('log').classList.toggle('wrapped', $('log-wrap').checked);
}

export function show(isVisible, id) {
  visible = isVisible;
  if (!visible) { open?.aborter.abort(); open = null; return; }
  render();
  if (id) $('log-instance').value = id;
  read($('log-instance').value);
}

export function render() {
  if (!visible) return;
  const all = [...known.instances.values()];
  const chosen = $('log-instance').value;
  keyed($('log-instance'), all, one => one.id, () => el('option', {}), (option, one) => { option.value = one.id; text(option, `${nameOf(one)} · ${one.id} · ${word(one.status)}`); });
  if (known.instances.has(chosen)) $('log-instance').value = chosen;
  if (!open && all.length) read($('log-instance').value);
  else if (!all.length && !lines.length) text($('log-about'), t('log_none'));
  else about();
}

async function read(id, anew = false) {
  if (!id || (open?.id === id && !anew)) return;
  open?.aborter.abort();
  const mine = open = { id, aborter: new AbortController() };
  lines = [];
  rest = ended = '';
  redraw();
  const follow = $('log-follow').checked;
  try {
    for await (const piece of pieces('GET', `/instances/${id}/logs?tail=${TAIL}${follow ? '&follow=1' : ''}`, { signal: mine.aborter.signal })) add(piece);
    ended = follow ? t('log_ended') : '';
  } catch (error) {
    if (error.name === 'AbortError') return;
    ended = t('log_lost', { why: error.message });
  }
  if (open === mine) { if (rest) { lines.push(clean(rest)); rest = ''; } redraw(); }
}

// A progress bar overwrites its line: what stands last is what was seen.  Colours of a terminal are left out.
function clean(line) {
  return line.replace(/\r+$/, '').split('\r').at(-1).replace(/\x1b\[[0-9;?]*[A-Za-z]/g, '');
}

function add(piece) {
  const parts = (rest + piece).split('\n');
  rest = parts.pop();
  lines.push(...parts.map(clean));
  if (lines.length > KEPT) lines = lines.slice(-KEPT);
  timer ??= setTimeout(() => { timer = null; redraw(); }, DRAWN_MS);
}

function redraw() {
  const place = $('log');
  const atEnd = place.scrollHeight - place.scrollTop - place.clientHeight < 40;
  const wanted = $('log-search').value.toLowerCase();
  const only = $('log-only').checked && wanted;
  const shown = only ? lines.filter(line => line.toLowerCase().includes(wanted)) : lines;
  place.replaceChildren(...shown.map(line => el('div', { class: levelOf(line) }, ...marked(line, wanted))));
  if (atEnd || !$('log-follow').checked) place.scrollTop = place.scrollHeight;
  about();
}

function about() {
  const wanted = $('log-search').value.toLowerCase();
  const n = lines.length;
  const said = wanted ? t('log_found', { n, found: lines.filter(line => line.toLowerCase().includes(wanted)).length }) : t('log_about', { n });
  text($('log-about'), [said, ended].filter(Boolean).join(' · '));
}

function levelOf(line) {
  return /\b(ERROR|CRITICAL)\b|Traceback|Error:/.test(line) ? 'line error' : /\bWARNING\b/.test(line) ? 'line warning' : 'line';
}

function marked(line, wanted) {
  if (!wanted) return [line];
  const found = [];
  const lower = line.toLowerCase();
  let from = 0;
  for (let at = lower.indexOf(wanted); at >= 0; at = lower.indexOf(wanted, from)) {
    found.push(line.slice(from, at), el('mark', {}, line.slice(at, at + wanted.length)));
    from = at + wanted.length;
  }
  return [...found, line.slice(from)];
}
