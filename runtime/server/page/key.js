/**
 * The API key, as the user typed it: kept in sessionStorage, so that it ends with the tab, and nowhere else.
 */

const NAME = "c2c-export.api-key";

/** @returns {string} the key, or "" where there is none. */
export function readKey() {
  return sessionStorage.getItem(NAME) ?? "";
}

/** Keep `key`; "" forgets it. */
export function keepKey(key) {
  if (key) sessionStorage.setItem(NAME, key);
  else sessionStorage.removeItem(NAME);
}
