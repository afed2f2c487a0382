/** What the page remembers of this tab over a reload; gone when the tab is closed, never sent anywhere. */

/** @param {string} key @returns {any} null if there is nothing, or nothing that can be read */
export function remembered(key) {
  try {
    return JSON.parse(sessionStorage.getItem(`deltamoe-${key}`) ?? "null");
  } catch {
    return null;
  }
}

/** @param {string} key @param {any} value */
export function remember(key, value) {
  try {
    sessionStorage.setItem(`deltamoe-${key}`, JSON.stringify(value));
  } catch { /* full, or a page without storage: it holds until the page is left */ }
}
