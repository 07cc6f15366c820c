/**
 * One answer on the page: its text as it comes, what to know about it, and its timeline.
 */

import { element } from "./elements.js";
import { Timeline } from "./timeline.js";
import { phasesOf, phasesSoFar, speed } from "./timings.js";

const SLOW = matchMedia("(prefers-reduced-motion: reduce)");
const ENDS = { length: ", cut off by the limit", stop: "" };

/** A box for one answer, which is used again when the question is asked again. */
export class Answer {
  #text = element("p", { class: "text", dir: "auto" });
  #note = element("p", { class: "note" });
  #facts = element("p", { class: "facts" });
  #retry = element("button", { type: "button", class: "retry", hidden: true }, "Ask again");
  #timeline;
  #clock = null;
  #started = 0;
  #first = null;
  #numPieces = 0;
  #numSharers;

  /**
   * @param {object} side `kind`, `label`, `detail` and `numSharers` of the way to answer
   * @param {Axis} axis of the turn
   */
  constructor(side, axis) {
    this.label = side.label;
    this.#numSharers = side.numSharers;
    this.#timeline = new Timeline(axis);
    const title = element("h3", {}, side.label, " ", element("span", { class: "detail" }, side.detail));
    const parts = [title, this.#text, this.#note, this.#retry, this.#timeline.element, this.#facts];
    this.element = element("article", { class: `answer ${side.kind}`, "aria-label": side.label }, ...parts);
  }

  /** All that was said so far. */
  get text() {
    return this.#text.textContent;
  }

  /** Begin anew: a request is being sent. */
  begin() {
    this.#text.textContent = this.#facts.textContent = "";
    this.tell("");
    this.#retry.hidden = true;
    this.element.setAttribute("aria-busy", "true");
    [this.#started, this.#first, this.#numPieces] = [performance.now(), null, 0];
    this.#tick();
    clearInterval(this.#clock);
    this.#clock = setInterval(() => this.#tick(), SLOW.matches ? 500 : 100);
  }

  /** A further piece of the answer came. */
  add(text) {
    this.#first ??= this.#elapsed;
    this.#numPieces += 1;
    this.#text.append(text);
  }

  /** Say `sentence` below the text; "" says nothing. An error is marked as one. */
  tell(sentence, isError = false) {
    this.#note.textContent = sentence;
    this.#note.classList.toggle("error", isError);
  }

  /** The answer is complete; `end` is what `streamChat` returned. */
  finish(end) {
    this.end();
    if (!this.text) this.tell("The answer is empty.");
    const numTokens = end.usage?.completion_tokens ?? this.#numPieces;
    const facts = [count(numTokens, "token") + ENDS[end.finishReason]];
    if (end.timings) {
      this.#timeline.show(phasesOf(end.timings, numTokens, this.#numSharers));
      facts.push(speed(numTokens, end.timings.decode));
    }
    if (end.usage) {
      const reused = end.reusedTokens ? `, ${end.reusedTokens} of them reused` : "";
      facts.push(`prompt of ${count(end.usage.prompt_tokens, "token")}${reused}`);
    }
    this.#facts.textContent = facts.filter(Boolean).join(" · ");
  }

  /** Nothing more comes. What was measured here stays. */
  end() {
    clearInterval(this.#clock);
    this.#clock = null;
    this.element.removeAttribute("aria-busy");
  }

  /** As `end`, where nothing was measured: the server refused. */
  dismiss() {
    this.end();
    this.#timeline.show([]);
  }

  /** Offer to ask again, by `ask`; null withdraws the offer. */
  offerRetry(ask) {
    this.#retry.hidden = ask === null;
    this.#retry.onclick = ask;
  }

  get #elapsed() {
    return (performance.now() - this.#started) / 1000;
  }

  #tick() {
    const elapsed = this.#elapsed;
    this.#timeline.show(phasesSoFar(elapsed, this.#first));
    const rate = this.#first === null ? "" : speed(this.#numPieces, elapsed - this.#first);
    this.#facts.textContent = rate ? `about ${rate} so far` : "";
  }
}

function count(number, name) {
  return `${number} ${name}${number === 1 ? "" : "s"}`;
}
