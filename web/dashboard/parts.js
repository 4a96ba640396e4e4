// What every part of the page uses.

export * from './dom.js';
export { currentLanguage, t, useLanguage, whenLanguageChanges } from './texts.js';
