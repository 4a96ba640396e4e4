// Elements and figures.  Whatever comes from the API is set as text, never as markup.

import { currentLanguage, t } from './texts.js';

export const $ = id => document.getElementById(id);

export function el(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  setAll(made, attributes);
  made.append(...children.filter(child => child !== null && child !== undefined));
  return made;
}

const SVG = 'http://www.w3.org/2000/svg';
export function svg(name, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, name);
  setAll(made, attributes);
  made.append(...children);
  return made;
}

function setAll(made, attributes) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith('on')) made.addEventListener(key.slice(2), value);
    else made.setAttribute(key, value === true ? '' : value);
  }
}

// Sets what differs, so that nothing flickers and no selection is lost.
export function text(node, value) { if (node.textContent !== value) node.textContent = value; }
export function attr(node, name, value) {
  if (value === null || value === false || value === undefined) node.removeAttribute(name);
  else if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value);
}

// Children of `parent` for `items`, each kept as long as its key is there: focus stays where it is.
export function keyed(parent, items, keyOf, create, update) {
  const known = new Map([...parent.children].map(child => [child.dataset.key, child]));
  let place = parent.firstElementChild;
  for (const item of items) {
    const key = String(keyOf(item));
    let child = known.get(key);
    known.delete(key);
    if (!child) {
      child = create(item);
      child.dataset.key = key;
    }
    if (child === place) place = place.nextElementSibling;
    else parent.insertBefore(child, place);
    update?.(child, item);
  }
  for (const child of known.values()) child.remove();
}

// --- figures -----------------------------------------------------------------------------------------------------

const formats = new Map();
function format(options) {
  const key = currentLanguage() + JSON.stringify(options);
  if (!formats.has(key)) formats.set(key, new Intl.NumberFormat(currentLanguage(), options));
  return formats.get(key);
}

export const DASH = '–';
export const missing = value => value === null || value === undefined;

export function number(value, digits = 0) {
  return missing(value) ? DASH : format({ maximumFractionDigits: digits, minimumFractionDigits: digits }).format(value);
}

export function rate(value) {
  if (missing(value)) return DASH;
  return number(value, value === 0 || value >= 100 ? 0 : value >= 10 ? 1 : 2);
}

// Of an axis: no more digits than it takes.
export function plain(value) { return format({ maximumSignificantDigits: 3 }).format(value); }

export function percent(value) {
  return missing(value) ? DASH : format({ style: 'percent', maximumFractionDigits: 0 }).format(value);
}

export function bytes(value) {
  if (missing(value)) return DASH;
  const gib = value / 2 ** 30;
  return gib >= 1 ? `${number(gib, 1)} GiB` : `${number(value / 2 ** 20)} MiB`;
}

// How long something took: 85 ms, 1.25 s, 2 min 05 s
export function took(seconds) {
  if (missing(seconds)) return DASH;
  if (seconds < 0.00995) return `${number(seconds * 1000, 1)} ms`;
  if (seconds < 0.9995) return `${number(seconds * 1000)} ms`;
  if (seconds < 60) return `${number(seconds, seconds < 10 ? 2 : 1)} s`;
  return `${Math.floor(seconds / 60)} min ${String(Math.round(seconds % 60)).padStart(2, '0')} s`;
}

// A countdown: 9:32, 1:02:10
export function clock(seconds) {
  const whole = Math.max(0, Math.ceil(seconds));
  const [h, m, s] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60].map(part => String(part).padStart(2, '0'));
  return whole >= 3600 ? `${Number(h)}:${m}:${s}` : `${Number(m)}:${s}`;
}

export function timeOfDay(at) {
  return new Date(at * 1000).toLocaleTimeString(currentLanguage(), { hour: '2-digit', minute: '2-digit', second: '2-digit', hour12: false });
}

export function word(name) {
  const found = t(name);
  return found === name ? name.replaceAll('_', ' ') : found;
}

// A model has the same colour everywhere, for as long as the page is open.
const colours = new Map();
export const COLOURS = 8;
export function colourOf(model) {
  if (!colours.has(model)) colours.set(model, colours.size % COLOURS);
  return colours.get(model);
}
