// @ts-check
import { html } from "../lib/html.js";

/** Strokes on a 16 x 16 field. @type {Record<string, string>} */
const SHAPES = {
  pulse: "M1.5 8.5h3l2-5 3 9 2-4h3",
  box: "M8 1.8 14 5v6l-6 3.2L2 11V5zM2.2 5.1 8 8.2l5.8-3.1M8 8.2v6",
  chip: "M4.5 4.5h7v7h-7zM6.5 2v2.5M9.5 2v2.5M6.5 11.5V14M9.5 11.5V14M2 6.5h2.5M2 9.5h2.5M11.5 6.5H14M11.5 9.5H14",
  branch: "M4.5 10.5V5.5M4.5 5.5a1.5 1.5 0 1 0 0-3 1.5 1.5 0 0 0 0 3ZM4.5 13.5a1.5 1.5 0 1 0 0-3 1.5 1.5 0 0 0 0 3ZM11.5 6.5a1.5 1.5 0 1 0 0-3 1.5 1.5 0 0 0 0 3ZM11.5 6.5c0 3-3 3-7 4",
  chat: "M2 3.5h12v8H7.5L4.5 14v-2.5H2z",
  list: "M5.5 4H14M5.5 8H14M5.5 12H14M2 4h.5M2 8h.5M2 12h.5",
  clock: "M8 14A6 6 0 1 0 8 2a6 6 0 0 0 0 12ZM8 4.8V8l2.2 1.6",
  target: "M8 14A6 6 0 1 0 8 2a6 6 0 0 0 0 12ZM8 10.5a2.5 2.5 0 1 0 0-5 2.5 2.5 0 0 0 0 5Z",
  users: "M6 8a2.5 2.5 0 1 0 0-5 2.5 2.5 0 0 0 0 5ZM1.8 13.5c0-2.4 1.8-4 4.2-4s4.2 1.6 4.2 4M10.5 3.2a2.5 2.5 0 0 1 0 4.6M12 9.9c1.4.6 2.2 1.9 2.2 3.6",
  scroll: "M4 2h8v12H4zM6 5h4M6 8h4M6 11h2",
  gear: "M2 4.5h7M12.5 4.5H14M2 11.5h1.5M7 11.5h7M10.7 6.2a1.7 1.7 0 1 0 0-3.4 1.7 1.7 0 0 0 0 3.4ZM5.3 13.2a1.7 1.7 0 1 0 0-3.4 1.7 1.7 0 0 0 0 3.4Z",
  image: "M2 3h12v10H2zM5.5 7a1 1 0 1 0 0-2 1 1 0 0 0 0 2ZM2.5 12l4-4 2.5 2.5L11 9l3 3",
  key: "M5.5 11.5a3 3 0 1 0 0-6 3 3 0 0 0 0 6ZM8.3 8.5H14M12 8.5v2.3",
  search: "M7 12A5 5 0 1 0 7 2a5 5 0 0 0 0 10ZM10.6 10.6 14 14",
  menu: "M2 4h12M2 8h12M2 12h12",
  close: "M3.5 3.5l9 9M12.5 3.5l-9 9",
  check: "M3 8.5l3.2 3.2L13 4.8",
  warn: "M8 2.2 14.5 13.5h-13zM8 6.5v3.3M8 11.6v.2",
  bad: "M8 14A6 6 0 1 0 8 2a6 6 0 0 0 0 12ZM5.8 5.8l4.4 4.4M10.2 5.8l-4.4 4.4",
  ok: "M8 14A6 6 0 1 0 8 2a6 6 0 0 0 0 12ZM5.2 8.3l2 2 3.6-4.2",
  info: "M8 14A6 6 0 1 0 8 2a6 6 0 0 0 0 12ZM8 7.3v3.6M8 5.1v.2",
  idle: "M8 14A6 6 0 1 0 8 2a6 6 0 0 0 0 12ZM5.5 8h5",
  busy: "M8 2a6 6 0 1 1-5.6 3.9",
  pause: "M5.5 3.5v9M10.5 3.5v9",
  play: "M4.5 3v10l8-5z",
  stop: "M4 4h8v8H4z",
  up: "M8 13V3.5M4 7.2 8 3.2l4 4",
  down: "M8 3v9.5M4 8.8l4 4 4-4",
  left: "M10 3 5 8l5 5",
  right: "M6 3l5 5-5 5",
  undo: "M3 6.5h6.5a3.5 3.5 0 0 1 0 7H6M3 6.5 6 3.5M3 6.5l3 3",
  refresh: "M13 8a5 5 0 1 1-1.6-3.7M13 2.2v3h-3",
  copy: "M5.5 5.5h8v8h-8zM3.5 10.5h-1v-8h8v1",
  plus: "M8 3v10M3 8h10",
  trash: "M3 4.5h10M6 4.5V3h4v1.5M4.5 4.5 5 13.5h6l.5-9",
  sun: "M8 11a3 3 0 1 0 0-6 3 3 0 0 0 0 6ZM8 1.5v1M8 13.5v1M1.5 8h1M13.5 8h1M3.4 3.4l.7.7M11.9 11.9l.7.7M3.4 12.6l.7-.7M11.9 4.1l.7-.7",
  moon: "M13.5 9.5A6 6 0 0 1 6.5 2.5a6 6 0 1 0 7 7Z",
  out: "M6.5 2.5h-4v11h4M6 8h8M11 5l3 3-3 3",
  link: "M9 3h4v4M13 3 7.5 8.5M7 4H3.5v8.5H12V9",
  send: "M14 2 7 9M14 2l-4.5 12L7 9 2 6.5z",
  coin: "M8 14A6 6 0 1 0 8 2a6 6 0 0 0 0 12ZM10 6c-.4-.8-1.100-1-2-1-1.200 0-2 .6-2 1.500 0 2 4 1 4 3 0 1-.9 1.500-2 1.500-1 0-1.700-.300-2-1M8 4v1M8 11v1",
  flask: "M6 2h4M6.8 2v4L3 13h10L9.200 6V2M5 10h6",
};

/** @param {{name: string, size?: number}} props */
export const Icon = ({ name, size = 16 }) => html`
  <svg width=${size} height=${size} viewBox="0 0 16 16" fill="none" stroke="currentColor" stroke-width="1.4" stroke-linecap="round" stroke-linejoin="round" aria-hidden="true">
    <path d=${SHAPES[name] ?? SHAPES.info} />
  </svg>
`;

/** A ring that guides a line. @param {{size?: number}} props */
export const Mark = ({ size = 22 }) => html`
  <svg width=${size} height=${size} viewBox="0 0 24 24" fill="none" stroke="currentColor" stroke-linecap="round" aria-hidden="true">
    <circle cx="13" cy="12" r="6.600" stroke-width="2.600" />
    <path d="M1.500 18.500C6 18.500 8.500 15 11.500 12.600S18 8 22.500 6.500" stroke-width="2" />
  </svg>
`;
