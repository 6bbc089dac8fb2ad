// Helpers of the report and of the view of a recording: elements, packed data, and parameters in the address.
"use strict";

const $ = (selector) => document.querySelector(selector);
const some = (list) => !missing(list) && list.length > 0;

/** Return a response with the content of gzipped data in base64. */
async function inflate(base64) {
  const bytes = Uint8Array.from(atob(base64), (byte) => byte.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip")));
}

const parameters = () => new URLSearchParams(location.hash.slice(1));

/** Return a word of a command line, in quotes if a shell would read it otherwise. */
const shellWord = (word) => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`);

/** Change parameters of the address without a step in the history; null removes one. */
function setParameters(changes) {
  const changed = parameters();
  for (const [name, value] of Object.entries(changes)) {
    if (missing(value)) changed.delete(name);
    else changed.set(name, value);
  }
  const words = [...changed].map(([name, value]) => (value === "" ? name : `${name}=${encodeURIComponent(value)}`));
  history.replaceState(null, "", words.length ? `#${words.join("&")}` : location.pathname + location.search);
}
