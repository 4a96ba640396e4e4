// Puts the page together: views, key, theme, language, notices.

import * as activity from './activity.js';
import { get, key, needsKey } from './api.js';
import { askKey } from './dialogs.js';
import { begin, known, whenChanged } from './live.js';
import * as logs from './logs.js';
import * as overview from './overview.js';
import { $, attr, currentLanguage, el, keyed, t, text, useLanguage, whenLanguageChanges } from './parts.js';
import * as playground from './playground.js';
import { firstLanguage, remember } from './texts.js';

const VIEWS = ['overview', 'playground', 'logs', 'activity'];
const THEMES = ['auto', 'light', 'dark'];
const SIGNS = { auto: '◐', light: '☀', dark: '☾' };
const NOTICE_MS = 12000;

let view = 'overview';
let passing = [];               // notices that go by themselves

// --- views -------------------------------------------------------------------------------------------------------

function openView(name, what) {
  if (location.hash !== `#/${name}`) history.pushState(null, '', `#/${name}`);
  showView(name, what);
}

function showView(name, what) {
  view = VIEWS.includes(name) ? name : 'overview';
  for (const one of VIEWS) $(one).hidden = one !== view;
  for (const link of document.querySelectorAll('[data-view]')) attr(link, 'aria-current', link.dataset.view === view ? 'page' : null);
  showTitle();
  scrollTo(0, 0);
  logs.show(view === 'logs', view === 'logs' ? what : undefined);
  if (view === 'playground' && what) playground.choose(what);
  render('all');
}

function render(what) {
  renderLink();
  renderNotices();
  if (view === 'overview') overview.render(what);
  if (view === 'playground') playground.render();
  if (view === 'logs' && (what === 'all' || what === 'instances')) logs.render();
  if (view === 'activity' && ['all', 'requests', 'events', 'language'].includes(what)) activity.render(what);
}

function renderLink() {
  $('link').className = `link is-${known.link}`;
  text($('link-text'), t(known.link));
  text($('version'), known.health.version ?? '');
}

// --- notices -----------------------------------------------------------------------------------------------------

function notice(message, kind = '') {
  const one = { message, kind, until: Date.now() + NOTICE_MS };
  passing.push(one);
  renderNotices();
  setTimeout(() => { passing = passing.filter(other => other !== one); renderNotices(); }, NOTICE_MS);
}

function renderNotices() {
  const lasting = [];
  if (known.health.simulated) lasting.push({ message: t('simulated'), kind: 'mild' });
  if (known.health.config?.error) lasting.push({ message: t('config_error', { error: known.health.config.error }), kind: 'bad' });
  if (known.refused) lasting.push({ message: known.refused.status === 401 && key() && known.listed.length ? t('limited') : t('no_management', { why: known.refused.message }), kind: 'bad' });
  keyed($('notices'), [...lasting, ...passing], one => one.message, () => el('p', {}), (item, one) => { item.className = `notice ${one.kind}`; text(item, one.message); });
}

// --- key, theme, language ----------------------------------------------------------------------------------------

async function login() {
  await askKey(async () => {
    try {
      await get('/instances');
    } catch (error) {
      // A key for inference alone will do for the playground; where inference needs none, it is no key at all.
      if (error.status === 401 && !(await needsKey('/v1/models') && await get('/v1/models').catch(() => null))) throw error;
    }
    await begin();
  });
}

function useTheme(theme) {
  if (theme === 'auto') delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  remember('theme', theme);
  renderTheme();
}

function renderTheme() {
  const theme = document.documentElement.dataset.theme ?? 'auto';
  text($('theme'), SIGNS[theme]);
  attr($('theme'), 'aria-label', t(`theme_${theme}`));
  attr($('theme'), 'title', t(`theme_${theme}`));
  text($('language'), t('other_language'));
  attr($('language'), 'lang', currentLanguage() === 'zh' ? 'en' : 'zh-CN');
}

async function main() {
  overview.start({ notice, openView });
  playground.start();
  logs.start();
  activity.start();
  whenChanged(render);
  whenLanguageChanges(() => { renderTheme(); render('language'); showTitle(); });
  $('theme').onclick = () => useTheme(THEMES[(THEMES.indexOf(document.documentElement.dataset.theme ?? 'auto') + 1) % THEMES.length]);
  $('language').onclick = () => { const other = currentLanguage() === 'zh' ? 'en' : 'zh'; remember('language', other); useLanguage(other); render('all'); };
  $('key').onclick = () => login();
  addEventListener('popstate', () => showView(location.hash.slice(2)));
  useLanguage(firstLanguage());
  showView(location.hash.slice(2));
  const allowed = await begin();
  if (!allowed && known.refused?.status === 401) await login();
}

function showTitle() { document.title = `${t(view)} · vllm-server`; }

main();
