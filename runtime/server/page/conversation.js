/**
 * The conversation: each question goes to all sides at once, and their answers stream in beside each other.
 */

import { announce } from "./announcer.js";
import { Answer } from "./answer.js";
import { element } from "./elements.js";
import { ServerError, streamChat } from "./server.js";
import { Axis } from "./timeline.js";

const BUSY_TRIES = 5;

/** The turns of a chat, on the page and in the sides' histories. */
export class Conversation {
  #container;
  #sides;
  #abort = null;
  #number = 0;
  #last = [];

  /**
   * @param {HTMLElement} container to put turns into
   * @param {Side[]} sides
   */
  constructor(container, sides) {
    this.#container = container;
    this.#sides = sides;
  }

  /** Called with whether answers are being waited for, when that changes. */
  onRunning = () => {};
  /** Called with null after an answer, and with the `ServerError` that ended one. */
  onOutcome = () => {};

  /** Whether answers are being waited for. */
  get isRunning() {
    return this.#abort !== null;
  }

  /** Ask all sides; resolves when all have answered, or failed to. */
  async ask(question) {
    this.#last.forEach(({ answer }) => answer.offerRetry(null));
    this.#number += 1;
    const axis = new Axis();
    this.#last = this.#sides.map((side) => {
      const { detail, fields } = side.choose();
      const numSharers = fields.sharers?.length ?? 0;
      const answer = new Answer({ kind: side.kind, label: side.label, detail, numSharers }, axis);
      return { side, question, fields, answer, failure: null };
    });
    const id = `question-${this.#number}`;
    const turn = element(
      "section",
      { class: "turn", "aria-labelledby": id },
      element("h2", { id, class: "question", dir: "auto" }, question),
      element("div", { class: "answers" }, ...this.#last.map(({ answer }) => answer.element)),
    );
    this.#container.append(turn);
    turn.scrollIntoView({ block: "start" });
    announce(`Asked. ${this.#sides.map((side) => side.label).join(" and ")} will be read out when complete.`);
    await this.#run(this.#last);
  }

  /** Ask those sides again that failed for this reason in the last turn. */
  async askAgain(kind) {
    const failed = this.#last.filter(({ failure }) => failure === kind);
    if (failed.length && !this.isRunning) await this.#run(failed);
  }

  /** Stop all answers; what came of them stays. */
  stop() {
    this.#abort?.abort();
  }

  /** Begin a new chat; what runs is stopped. */
  clear() {
    this.stop();
    this.#container.querySelectorAll(".turn").forEach((turn) => turn.remove());
    this.#sides.forEach((side) => side.clear());
    this.#last = [];
  }

  async #run(asked) {
    const abort = new AbortController();
    this.#abort = abort;
    this.onRunning(true);
    await Promise.all(asked.map((each) => this.#answer(each, abort.signal)));
    this.#abort = null;
    this.onRunning(false);
  }

  async #answer(each, signal) {
    const { side, question, fields, answer } = each;
    each.failure = null;
    try {
      const end = await this.#stream(side.request(question, fields), answer, signal);
      answer.finish(end);
      announce(`${answer.label} answered: ${answer.text}`);
      this.onOutcome(null);
    } catch (error) {
      if (answer.text) answer.end();
      else answer.dismiss();
      if (signal.aborted) {
        if (!answer.text) each.failure = "stopped";
        answer.tell(answer.text ? "Stopped by you." : "Stopped by you before it began.");
        announce(`${answer.label}: stopped.`);
      } else {
        // What is no error of the server is one of this page: it must not look like an answer.
        if (!(error instanceof ServerError)) console.error(error);
        each.failure = error instanceof ServerError ? error.kind : "failed";
        const message = error instanceof ServerError ? error.message : `The page failed: ${error.message}`;
        answer.tell(message, true);
        announce(`${answer.label}: ${message}`);
        if (error instanceof ServerError) this.onOutcome(error);
      }
    }
    // A chat that was cleared meanwhile has no turns to keep or to ask again.
    if (!this.#last.includes(each)) return;
    if (each.failure) answer.offerRetry(() => this.isRunning || this.#run([each]));
    else side.keep(question, answer.text);
  }

  /** Stream one answer; a busy server is asked again, as often and as late as it is fair. */
  async #stream(body, answer, signal) {
    for (let tries = 1; ; tries += 1) {
      answer.begin();
      try {
        const pieces = streamChat(body, signal);
        for (;;) {
          const { done, value } = await pieces.next();
          if (done) return value;
          answer.add(value.text);
        }
      } catch (error) {
        if (error.kind === "full" && body.max_tokens) {
          // Room for a shorter answer may be left.
          delete body.max_tokens;
          continue;
        }
        if (error.kind !== "busy" || tries === BUSY_TRIES) throw error;
        answer.dismiss();
        this.onOutcome(error);
        if (tries === 1) announce(`${answer.label}: ${error.message} It will be asked again.`);
        await countDown(error.retryAfter, signal, (left) =>
          answer.tell(`${error.message} Asking again in ${left} s (${tries} of ${BUSY_TRIES - 1}).`),
        );
      }
    }
  }
}

/** Wait so many seconds, telling each that is left; rejects when aborted. */
async function countDown(secondsToWait, signal, tell) {
  for (let left = Math.ceil(secondsToWait); left > 0; left -= 1) {
    tell(left);
    await new Promise((resolve, reject) => {
      const timer = setTimeout(resolve, 1000);
      signal.addEventListener("abort", () => {
        clearTimeout(timer);
        reject(signal.reason);
      });
    });
  }
}
