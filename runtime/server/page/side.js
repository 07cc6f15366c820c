/**
 * One way to answer, the receiver alone or C2C, with its own history: each goes on from its own answers.
 */

/** A way to answer. */
export class Side {
  #history = [];

  /**
   * @param {string} kind "receiver" or "c2c"
   * @param {string} label as it is shown
   * @param {string} model its name for the API
   * @param {() => {detail: string, fields: object}} choose what is chosen at the time of asking: a note beside the
   *   label, and further fields of the request
   */
  constructor(kind, label, model, choose) {
    this.kind = kind;
    this.label = label;
    this.model = model;
    this.choose = choose;
  }

  /** @returns {object} the body of a request that asks `question` after all that was said. */
  request(question, fields) {
    const messages = [...this.#history, { role: "user", content: question }];
    return { model: this.model, messages, temperature: 0, ...fields };
  }

  /** Keep a turn. One without an answer is not kept: roles take turns. */
  keep(question, answer) {
    if (answer.trim()) {
      this.#history.push({ role: "user", content: question }, { role: "assistant", content: answer });
    }
  }

  /** Begin a new chat. */
  clear() {
    this.#history = [];
  }
}
