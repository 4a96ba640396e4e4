// A chat with a model, streamed: how long its first token took, and how fast the others came.

import { events } from './api.js';
import { known } from './live.js';
import { $, el, keyed, number, t, text, took } from './parts.js';

let messages = [];              // what the model is sent
let aborter = null;

export function start() {
  $('ask').onsubmit = event => { event.preventDefault(); send(); };
  $('prompt').addEventListener('keydown', event => {
    if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
  });
  $('play-stop').onclick = () => aborter?.abort();
  $('play-clear').onclick = clear;
  $('settings').onsubmit = event => event.preventDefault();
  clear();
}

export function choose(model) {
  render();
  if ([...$('play-model').options].some(one => one.value === model)) $('play-model').value = model;
  $('prompt').focus();
}

export function render() {
  const select = $('play-model');
  const chosen = select.value;
  const names = known.listed.map(one => one.id);
  keyed(select, names.length ? names : [''], one => one, () => el('option', {}), (option, name) => { option.value = name; text(option, name || t('no_chat_models')); });
  if (names.includes(chosen)) select.value = chosen;
  if ($('talk').dataset.empty) text($('talk').firstChild, t('play_empty'));
}

function clear() {
  aborter?.abort();
  messages = [];
  $('talk').replaceChildren(el('p', { class: 'none' }, t('play_empty')));
  $('talk').dataset.empty = '1';
  text($('play-figures'), '');
}

function bubble(kind, who) {
  if ($('talk').dataset.empty) { $('talk').replaceChildren(); delete $('talk').dataset.empty; }
  const body = el('div', { class: 'said' });
  const made = el('article', { class: `bubble ${kind}` }, el('h4', { class: 'small faint' }, who), body);
  $('talk').append(made);
  return { made, body };
}

function wanted() {
  const numberOf = id => $(id).value === '' ? undefined : Number($(id).value);
  const system = $('play-system').value.trim();
  return { model: $('play-model').value, stream: true, stream_options: { include_usage: true },
    messages: [...(system ? [{ role: 'system', content: system }] : []), ...messages],
    temperature: numberOf('play-temperature'), top_p: numberOf('play-top-p'), max_tokens: numberOf('play-max'), seed: numberOf('play-seed') };
}

async function send() {
  const content = $('prompt').value.trim();
  if (!content || aborter || !$('play-model').value || !$('settings').reportValidity()) return;
  messages.push({ role: 'user', content });
  const body = wanted();
  bubble('user', t('you')).body.textContent = content;
  const answer = bubble('model', body.model);
  $('prompt').value = '';
  aborter = new AbortController();
  $('play-stop').hidden = false;
  $('play-send').disabled = true;
  answer.made.classList.add('waits');
  text($('play-figures'), t('play_waits'));
  const run = { began: performance.now(), first: null, last: null, pieces: 0, tokens: null, text: '' };
  try {
    await read(body, answer, run);
  } catch (error) {
    const stopped = error.name === 'AbortError';
    answer.made.append(el('p', { class: stopped ? 'faint small' : 'error', role: stopped ? null : 'alert' }, stopped ? t('play_stopped') : error.message));
  } finally {
    if (run.text) messages.push({ role: 'assistant', content: run.text });
    else messages.pop();        // who asks again must not send the question twice
    answer.made.classList.remove('waits');
    aborter = null;
    $('play-stop').hidden = true;
    $('play-send').disabled = false;
    showFigures(run);
    answer.made.append(el('p', { class: 'figures faint small' }, $('play-figures').textContent));
  }
}

async function read(body, answer, run) {
  const talk = $('talk');
  let thought = null;
  for await (const one of events('POST', '/v1/chat/completions', { body, signal: aborter.signal })) {
    if (one.comment !== undefined) { if (run.first === null) text($('play-figures'), one.comment); continue; }
    if (one.data === '[DONE]') return;
    const data = JSON.parse(one.data);
    if (data.error) throw new Error(data.error.message ?? data.error);
    if (data.usage) run.tokens = data.usage.completion_tokens;
    const delta = data.choices?.[0]?.delta ?? {};
    const reasoning = delta.reasoning_content ?? delta.reasoning;
    if (!delta.content && !reasoning) continue;
    run.last = performance.now();
    run.first ??= run.last;
    run.pieces += 1;
    const atEnd = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 40;
    if (reasoning) {
      if (!thought) { thought = el('details', { class: 'thought faint' }, el('summary', {}, t('thinking')), el('div', {})); answer.made.insertBefore(thought, answer.body); }
      thought.lastChild.append(reasoning);
    }
    if (delta.content) { run.text += delta.content; answer.body.append(delta.content); }
    if (atEnd) talk.scrollTop = talk.scrollHeight;
    showFigures(run);
  }
}

function showFigures(run) {
  if (run.first === null) { text($('play-figures'), ''); return; }
  const n = run.tokens ?? run.pieces;
  const seconds = (run.last - run.first) / 1000;
  text($('play-figures'), t('play_figures', { ttft: took((run.first - run.began) / 1000), n: number(n),
    rate: seconds > 0 && n > 1 ? number((n - 1) / seconds, 1) : '–' }));
}
