/* Blank infilling in JavaScript, for the page beside this file: what a text with blanks becomes.

   The same as `units` and `blanked` in glm/infilling.py, `Sample` there, and the rule of visibility in glm/layout.py;
   tests/book/test_interactive.py compares them on random texts. `vocabulary` is what vocabulary.js holds. */
"use strict";

const layout = (() => {
  const IGNORED = -100; // the target of a token that nothing is learnt from
  const CJK = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff";
  const SPACE = "\\t-\\r\\x1c-\\x20\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000";
  const WORD = "\\p{L}\\p{N}_";
  const UNIT = new RegExp(
    `[${SPACE}]+|(?:[${CJK}]|(?:(?![${CJK}])[${WORD}])+|[^${WORD}${SPACE}])[${SPACE}]*`, "gu");
  const EDGES = new RegExp(`^[${SPACE}]+|[${SPACE}]+$`, "gu");

  /* What a text may be cut between: words, Chinese characters, signs; each with the white space after it. */
  const units = (text) => text.match(UNIT) || [];

  const strip = (text) => text.replace(EDGES, "");

  // -- text to ids: byte-level pairs ---------------------------------------------------------------------------------

  const blank = "\\t-\\r\\x20\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000"; // Unicode's White_Space
  const PIECE = new RegExp(
    `'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^${blank}\\p{L}\\p{N}]+|[${blank}]+(?![^${blank}])|[${blank}]+`, "gu");
  const APART = new RegExp(`[${CJK}]|[^${CJK}]+`, "gu");

  /* A function from text to ids. Bytes have ids in the order of `bytes`, pair r has id 256 + r; low r are joined first. */
  function encoder(vocabulary) {
    const idOfByte = new Map(vocabulary.bytes.map((byte, id) => [byte, id]));
    const rank = new Map(vocabulary.merges.map(([a, b], r) => [a * 65536 + b, r]));
    const utf8 = new TextEncoder();

    function joined(piece) {
      const ids = [...utf8.encode(piece)].map((byte) => idOfByte.get(byte));
      for (;;) {
        let best = Infinity, at = -1;
        for (let i = 0; i + 1 < ids.length; i++) {
          const r = rank.get(ids[i] * 65536 + ids[i + 1]);
          if (r !== undefined && r < best) [best, at] = [r, i];
        }
        if (at < 0) return ids;
        const [a, b] = vocabulary.merges[best];
        for (let i = at; i + 1 < ids.length; i++) if (ids[i] === a && ids[i + 1] === b) ids.splice(i, 2, 256 + best);
      }
    }

    return (text) => (text.match(APART) || []).flatMap((part) => (part.match(PIECE) || []).flatMap(joined));
  }

  /* A function from an id to its text; bytes that are no character as \xe4. */
  function speller(vocabulary) {
    const bytes = vocabulary.bytes.map((byte) => [byte]);
    for (const [a, b] of vocabulary.merges) bytes.push([...bytes[a], ...bytes[b]]);
    const names = new Map(Object.entries(vocabulary.special).map(([name, id]) => [id, name]));
    const strict = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
    return (id) => {
      if (names.has(id)) return names.get(id);
      try { return strict.decode(new Uint8Array(bytes[id])); } catch {
        return bytes[id].map((byte) => byte < 128 ? String.fromCharCode(byte) : `\\x${byte.toString(16)}`).join("");
      }
    };
  }

  // -- a text with blanks ---------------------------------------------------------------------------------------------

  /* Which neighbouring units are blank together: [start, end) in order, from a set of unit numbers. */
  function spansOf(chosen) {
    const spans = [];
    for (const i of [...chosen].sort((a, b) => a - b)) {
      if (spans.length && spans[spans.length - 1][1] === i) spans[spans.length - 1][1] = i + 1;
      else spans.push([i, i + 1]);
    }
    return spans;
  }

  /* The row that a model learns from. `spans` in the order of the text, `order` the numbers of spans in that of writing.

     ids      read tokens with [MASK] for each blank, then for each span <sop> and its ids
     targets  what the model should say after each: nothing while it reads, then the span and <eop>
     place    first position axis: where in the text; a written token stands where its blank does
     inside   second position axis: 0 for what is read, then 1, 2, 3 … within a span
     read     how many tokens are read */
  function sample(pieces, spans, order, encode, marks) {
    const read = [], places = [], contents = [];
    let end = 0;
    for (const [start, stop] of spans) {
      read.push(...encode(strip(pieces.slice(end, start).join(""))));
      places.push(read.length);
      contents.push(encode(strip(pieces.slice(start, stop).join(""))));
      read.push(marks.mask);
      end = stop;
    }
    read.push(...encode(strip(pieces.slice(end).join(""))));
    const row = {
      ids: [...read], targets: read.map(() => IGNORED), place: read.map((_, i) => i), inside: read.map(() => 0),
      read: read.length, span: read.map(() => -1),
    };
    for (const n of order) {
      row.ids.push(marks.sop, ...contents[n]);
      row.targets.push(...contents[n], marks.eop);
      for (let i = 0; i <= contents[n].length; i++) { row.place.push(places[n]); row.inside.push(i + 1); row.span.push(n); }
    }
    return row;
  }

  /* Whether token t sees token j: all that is read, and what was written no later than itself. */
  const sees = (row, t, j) => j < row.read || j <= t;

  return { IGNORED, units, strip, encoder, speller, spansOf, sample, sees };
})();

if (typeof module !== "undefined") module.exports = layout;
