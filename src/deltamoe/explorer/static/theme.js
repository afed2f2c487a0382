/** Dark or light: the reader's system decides until the reader does. */

const KEY = "deltamoe-theme";

function stored() {
  try {
    return localStorage.getItem(KEY);
  } catch {
    return null; // a page opened from a file may have no storage
  }
}

/** @param {string} theme */
function put(theme) {
  document.documentElement.dataset.theme = theme;
  dispatchEvent(new Event("themechange"));
}

const system = matchMedia("(prefers-color-scheme: dark)");

/** Follow the system, or the reader's last choice. */
export function startTheme() {
  const chosen = stored();
  put(chosen === "dark" || chosen === "light" ? chosen : system.matches ? "dark" : "light");
  system.addEventListener("change", () => {
    if (!stored()) put(system.matches ? "dark" : "light");
  });
}

/** The other one, from now on. */
export function switchTheme() {
  const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  try {
    localStorage.setItem(KEY, next);
  } catch { /* it holds until the page is closed */ }
  put(next);
}
