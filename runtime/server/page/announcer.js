/**
 * Tells a screen reader what happened: whole answers and changes of state, never single tokens.
 */

const KEPT = 4;

/** Say `text`, politely, after what is being said. */
export function announce(text) {
  const log = document.getElementById("announcer");
  const line = document.createElement("p");
  line.textContent = text;
  log.append(line);
  while (log.childElementCount > KEPT) log.firstElementChild.remove();
}
