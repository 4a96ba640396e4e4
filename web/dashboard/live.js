// What the page knows of the daemon, kept up to date: by events, or by asking every few seconds where they do not come.

import { ApiError, events, get } from './api.js';

const POLL_MS = 5000;
const SILENCE_MS = 35000;
const AGAIN_MS = [500, 1000, 2000, 5000, 10000];
const POLLS_BEFORE_EVENTS = 6;
const EVENTS_KEPT = 200;

export const known = {
  instances: new Map(),     // id -> what GET /instances says, and `seenAt` in milliseconds
  models: [],               // of config.yaml
  listed: [],               // GET /v1/models
  gpus: { data: [] },
  servers: [],
  health: {},
  history: { at: [], total: {}, instances: {}, models: {} },
  latest: { models: {}, instances: {}, total: {} },
  events: [],
  requests: [],
  link: 'connecting',
  refused: null,            // the ApiError of who may not manage
};

let changed = () => {};
let aborter = null;
let wanted = { failedRequests: false };
const KEPT_S = 3600;

export function whenChanged(listener) { changed = listener; }
export function wantRequests(failed) { wanted.failedRequests = failed; refreshRequests(); }

function setLink(link) { known.link = link; changed('link'); }

// The name that its figures go by.
export function nameOf(instance) {
  return known.latest.names?.[instance.id] ?? instance.aliases[0] ?? instance.model_name;
}

// Begin anew, with whatever key there is now.  Resolves when the first answers are here.
export async function begin() {
  aborter?.abort();
  aborter = new AbortController();
  const { signal } = aborter;
  known.refused = null;
  setLink('connecting');
  await refreshOpen();
  const allowed = await refreshAll();
  if (allowed && !signal.aborted) follow(signal);
  return allowed;
}

async function follow(signal) {
  let failures = 0;
  let last = '';
  while (!signal.aborted) {
    const silence = watchdog(SILENCE_MS);
    try {
      const headers = last ? { 'Last-Event-ID': last } : {};
      for await (const one of events('GET', '/admin/events?follow=1', { signal: AbortSignal.any([signal, silence.signal]), headers })) {
        silence.begin();
        if (one.comment !== undefined) continue;
        if (one.id) last = one.id;
        failures = 0;
        take(one.event, JSON.parse(one.data), signal);
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error.status === 401 || error.status === 403) { refuse(error); return; }
    } finally {
      silence.end();
    }
    if (signal.aborted) return;
    failures += 1;
    if (failures < 3) await sleep(AGAIN_MS[failures], signal);
    else await poll(signal);
  }
}

// A connection may die without a word: then what comes every few seconds does not.
function watchdog(ms) {
  const aborted = new AbortController();
  let bite = null;
  const end = () => clearTimeout(bite);
  const begin = () => { end(); bite = setTimeout(() => aborted.abort(), ms); };
  begin();
  return { signal: aborted.signal, begin, end };
}

async function poll(signal) {
  for (let n = 0; n < POLLS_BEFORE_EVENTS && !signal.aborted; n += 1) {
    try {
      await refreshOpen(true);
      if (!await refreshAll(true)) return;
      setLink('polling');
    } catch { setLink('offline'); }
    await sleep(POLL_MS, signal);
  }
}

function sleep(ms, signal) {
  return new Promise(resolve => {
    const timer = setTimeout(resolve, ms);
    signal.addEventListener('abort', () => { clearTimeout(timer); resolve(); }, { once: true });
  });
}

function take(kind, data, signal) {
  if (kind === 'hello') {
    setLink('live');
    refreshAll();
  } else if (kind === 'instance') {
    note(data.data);
    changed('instances');
  } else if (kind === 'gone') {
    known.instances.delete(data.instance);
    changed('instances');
    soon();
  } else if (kind === 'sample') {
    addSample(data);
    changed('sample');
    refreshRequests();
    refreshOpen(true).catch(() => {});
    get('/gpus', signal).then(found => { known.gpus = found; changed('gpus'); }).catch(() => {});
  } else {
    if (!known.events.some(one => one.id === data.id)) known.events = [...known.events, data].slice(-EVENTS_KEPT);
    changed('events');
    if (kind === 'state') soon();
  }
}

let timer = null;
function soon() {
  if (timer !== null) return;
  timer = setTimeout(() => { timer = null; refreshAll(true).catch(() => {}); }, 250);
}

function note(instance) { known.instances.set(instance.id, { ...instance, seenAt: Date.now() }); }

async function refreshOpen(raise = false) {
  try {
    const [health, load] = await Promise.all([get('/health'), get('/load-stats')]);
    known.health = health;
    known.servers = load.servers.filter(one => one.kind === 'server');
    changed('servers');
  } catch (error) {
    setLink('offline');
    if (raise) throw error;
  }
}

// Whether this page may manage.  With `raise`, other errors are thrown.
export async function refreshAll(raise = false) {
  const since = known.history.at.at(-1) ?? 0;
  try {
    const [instances, models, gpus, history, happened] = await Promise.all([
      get('/instances'), get('/admin/models'), get('/gpus'), get(`/admin/history?since=${since}`), get('/admin/events?tail=200')]);
    known.instances = new Map();
    for (const one of instances.data) note(one);
    known.models = models.data;
    known.gpus = gpus;
    known.events = happened.data;
    addHistory(history);
    known.refused = null;
    await Promise.all([refreshRequests(), refreshListed()]);
    changed('all');
    return true;
  } catch (error) {
    if (error.status === 401 || error.status === 403) {
      refuse(error);
      await refreshListed();
      changed('all');
      return false;
    }
    if (raise || !(error instanceof ApiError)) throw error;
    setLink('offline');
    return true;
  }
}

function refuse(error) {
  known.refused = error;
  known.instances = new Map();
  known.models = known.events = known.requests = [];
  setLink('refused');
  changed('all');
}

async function refreshListed() {
  try { known.listed = (await get('/v1/models')).data; } catch { known.listed = []; }
}

async function refreshRequests() {
  try {
    known.requests = (await get(`/admin/requests?tail=200${wanted.failedRequests ? '&failed=1' : ''}`)).data;
    changed('requests');
  } catch { /* the link says it */ }
}

// --- the last hour -----------------------------------------------------------------------------------------------

const FIGURES = ['tokens_per_s', 'requests_per_s', 'ttft_s', 'in_flight', 'waiting', 'cache_usage'];

function addHistory(told) {
  for (let n = 0; n < told.at.length; n += 1) {
    const pick = columns => Object.fromEntries(FIGURES.map(name => [name, columns[name][n]]));
    add(told.at[n], pick(told.total), Object.fromEntries(Object.entries(told.models).map(([name, columns]) => [name, pick(columns)])));
    known.latest = { total: pick(told.total), models: {}, names: Object.fromEntries(Object.entries(told.instances).map(([id, one]) => [id, one.model])),
      instances: Object.fromEntries(Object.entries(told.instances).map(([id, columns]) => [id, pick(columns)])) };
  }
}

function addSample(data) {
  known.latest = data;
  add(data.at, data.total, data.models);
}

function add(at, total, models) {
  const history = known.history;
  if (at <= (history.at.at(-1) ?? 0)) return;
  history.at.push(at);
  push(history.total, total, history.at.length);
  for (const name of new Set([...Object.keys(history.models), ...Object.keys(models)])) {
    history.models[name] ??= {};
    push(history.models[name], models[name] ?? {}, history.at.length);
  }
  while (history.at[0] < at - KEPT_S) {
    history.at.shift();
    for (const columns of [history.total, ...Object.values(history.models)]) for (const column of Object.values(columns)) column.shift();
  }
}

function push(columns, row, length) {
  for (const name of FIGURES) {
    columns[name] ??= Array(length - 1).fill(null);
    columns[name].push(row[name] ?? null);
  }
}
