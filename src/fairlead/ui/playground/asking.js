// @ts-check
/** Asking a model from the page: through the data plane that is mounted beside it, with the session that looks. */
import { Problem, at, events } from "../lib/api.js";
import { useEffect, useRef, useState } from "../lib/html.js";
import { begun, complaint, taken } from "./answer.js";

export const DATA = "/ui/data";

/**
 * Name and version as a model's name in OpenAI's words.
 * @param {{name: string, version: string}} model
 */
export const named = ({ name, version }) => (version ? `${name}@${version}` : name);

/** The path of a file that the data plane's answers name with an address of its own. @param {string} url */
export const fileOf = (url) => DATA + url.slice(Math.max(url.indexOf("/v1/artifacts/"), 0));

/** @param {{name: string, version: string}} model */
export const inferPath = ({ name, version }) => `${DATA}${at("v2", "models", name, ...(version ? ["versions", version] : []), "infer")}`;

/** A complaint in the middle of an answer. @param {any} body */
export const refusal = (body) => new Problem(0, "", complaint(body, 0).message, [], body);

/** What is shown of anything that went wrong. @param {any} error @returns {import("./answer.js").Complaint} */
export const complained = (error) => (error instanceof Problem && error.body ? complaint(error.body, error.status) : { message: String(error?.message ?? error), detail: "" });

/**
 * The chunks of a streamed answer of OpenAI's shape. Throws a Problem.
 * @param {string} path
 * @param {any} body
 * @param {AbortSignal} signal
 */
export async function* chunks(path, body, signal) {
  for await (const { data } of events(DATA + path, { body, signal })) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw refusal(chunk);
    yield chunk;
  }
  throw new Problem(0, "", "the server broke off its answer");
}

/**
 * @typedef {object} Turn
 * @property {string} asked
 * @property {import("./answer.js").Answer} answer
 * @property {import("./answer.js").Complaint | null} error
 * @property {boolean} stopped
 */

/**
 * One side's conversation: what was said, and what says more. Pieces are drawn as often as the screen is.
 */
export function useConversation() {
  const [turns, setTurns] = useState(/** @type {Turn[]} */ ([]));
  const [busy, setBusy] = useState(false);
  const abort = useRef(/** @type {AbortController | null} */ (null));
  useEffect(() => () => abort.current?.abort(), []);

  /**
   * @param {string} text
   * @param {string} path
   * @param {(before: Turn[]) => any} bodyOf
   * @returns {Promise<void>}
   */
  const ask = async (text, path, bodyOf) => {
    const controller = (abort.current = new AbortController());
    const before = turns.filter((turn) => !turn.error);
    /** @type {Turn} */
    let turn = { asked: text, answer: begun(performance.now()), error: null, stopped: false };
    let frame = 0;
    const draw = () => {
      frame = 0;
      setTurns([...turns, turn]);
    };
    draw();
    setBusy(true);
    try {
      for await (const chunk of chunks(path, bodyOf(before), controller.signal)) {
        turn = { ...turn, answer: taken(turn.answer, chunk, performance.now()) };
        frame ||= requestAnimationFrame(draw);
      }
    } catch (error) {
      turn = controller.signal.aborted ? { ...turn, stopped: true } : { ...turn, error: complained(error) };
    }
    cancelAnimationFrame(frame);
    turn = { ...turn, answer: { ...turn.answer, ended: performance.now() } };
    draw();
    setBusy(false);
  };

  return { turns, busy, ask, stop: () => abort.current?.abort(), clear: () => setTurns([]) };
}
