// The public API.  The key goes along as a header only; it is kept for this tab, or on the device if that was asked for.

import { t } from './texts.js';

export class ApiError extends Error {
  constructor(message, status = 0, code = '') {
    super(message);
    this.status = status;
    this.code = code;
  }
}

const NAME = 'vllm-server-key';
const stores = () => [() => sessionStorage, () => localStorage].flatMap(open => { try { return [open()]; } catch { return []; } });

export function key() {
  for (const store of stores()) {
    const found = store.getItem(NAME);
    if (found) return found;
  }
  return '';
}

export function useKey(value, keep) {
  for (const store of stores()) store.removeItem(NAME);
  if (value) stores().at(keep ? -1 : 0)?.setItem(NAME, value);
}

async function send(method, path, { body, signal, headers = {} } = {}) {
  const sent = { ...headers };
  if (key()) sent.Authorization = `Bearer ${key()}`;
  if (body !== undefined) sent['Content-Type'] = 'application/json';
  let answer;
  try {
    answer = await fetch(path, { method, signal, headers: sent, cache: 'no-store', credentials: 'omit',
      body: body === undefined ? undefined : JSON.stringify(body) });
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new ApiError(t('unreachable'));
  }
  if (!answer.ok) {
    const told = await answer.json().catch(() => null);
    throw new ApiError(told?.error?.message ?? `${answer.status} ${answer.statusText}`, answer.status, told?.error?.code ?? '');
  }
  return answer;
}

export async function call(method, path, body, signal) {
  const answer = await send(method, path, { body, signal });
  return answer.status === 204 ? null : answer.json();
}

export const get = (path, signal) => call('GET', path, undefined, signal);

export async function needsKey(path) { return (await fetch(path, { credentials: 'omit', cache: 'no-store' })).status === 401; }

// A body as it comes, piece by piece; the pieces are text.
export async function* pieces(method, path, options) {
  const answer = await send(method, path, options);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// Server-sent events: {event, id, data}, and {comment} for a comment line.
export async function* events(method, path, options) {
  let rest = '';
  let current = {};
  for await (const piece of pieces(method, path, options)) {
    const lines = (rest + piece).split(/\r\n|\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (line === '') {
        if (current.data !== undefined) yield current;
        current = {};
      } else if (line.startsWith(':')) {
        yield { comment: line.slice(1).trim() };
      } else {
        const colon = line.indexOf(':');
        const [name, value] = colon < 0 ? [line, ''] : [line.slice(0, colon), line.slice(colon + 1).replace(/^ /, '')];
        current[name] = name === 'data' && current.data !== undefined ? `${current.data}\n${value}` : value;
      }
    }
  }
}
