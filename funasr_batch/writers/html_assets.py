"""The style sheet and the script of the HTML page, and the policy that allows nothing else."""

from __future__ import annotations

from base64 import b64encode
from hashlib import sha256
from typing import Final

STYLE: Final = """
:root {
  color-scheme: light dark;
  --paper: #fbfbf9; --ink: #1d1d1b; --faint: #6b6b66; --line: #dcdcd6;
  --now: #ffe08a; --hit: #9fd8ff; --low: #b45309; --link: #1a5fb4;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #191a1c; --ink: #e6e6e3; --faint: #9b9b95; --line: #36373a;
    --now: #6b5200; --hit: #1d4e74; --low: #f0a35e; --link: #8ab8ff;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 0 1rem 40vh; max-width: 46rem;
  background: var(--paper); color: var(--ink);
  font: 1.05rem/1.7 system-ui, "PingFang SC", "Noto Sans CJK SC", "Microsoft YaHei", sans-serif;
}
header {
  position: sticky; top: 0; z-index: 1; padding: 1rem 0 .7rem;
  background: var(--paper); border-bottom: 1px solid var(--line);
}
h1 { margin: 0; font-size: 1.15rem; line-height: 1.3; overflow-wrap: anywhere; }
.about, .note { margin: .1rem 0 .6rem; color: var(--faint); font-size: .85rem; }
.note { margin: .6rem 0 0; }
audio { display: block; width: 100%; height: 2.6rem; }
.find { display: flex; gap: .8rem; align-items: center; margin-top: .6rem; }
#search {
  flex: 1; min-width: 0; padding: .35rem .6rem; font: inherit; font-size: .95rem;
  color: inherit; background: transparent; border: 1px solid var(--line); border-radius: .4rem;
}
#found { min-width: 4.5rem; color: var(--faint); font-size: .85rem; text-align: end; }
section {
  display: flex; gap: 1rem; margin: .9rem 0;
  content-visibility: auto; contain-intrinsic-size: auto 3rem;
}
section[hidden], [hidden] { display: none; }
.time {
  flex: none; width: 3.4rem; text-decoration: none;
  color: var(--faint); font-size: .85rem; line-height: 2.1; font-variant-numeric: tabular-nums;
}
.time:hover, .now .time { color: var(--link); text-decoration: underline; }
section p { flex: 1; min-width: 0; margin: 0; overflow-wrap: anywhere; }
p span { border-radius: .2rem; cursor: pointer; }
p span:hover { background: var(--line); }
.low { text-decoration: underline dotted var(--low) 2px; text-underline-offset: .25em; }
.hit { background: var(--hit); }
.on, p span.on:hover { background: var(--now); }
@media print { header { position: static; } audio, .find { display: none; } body { padding: 0; } }
"""

SCRIPT: Final = """
"use strict";
(() => {
  const byId = id => document.getElementById(id);
  const player = byId("player"), search = byId("search"), found = byId("found");
  const sections = [...document.querySelectorAll("main section")];
  const words = [...document.querySelectorAll("main span[data-t]")];
  const time = element => element.dataset.t / 1000;
  const sectionTimes = sections.map(time), wordTimes = words.map(time);
  const wordEnds = words.map(word => word.dataset.e / 1000);

  // Following the recording

  let section = null, word = null, handsOffUntil = 0;
  const lastBegun = (times, now) => {
    let low = 0, high = times.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (times[middle] <= now) low = middle + 1; else high = middle;
    }
    return low - 1;
  };
  const move = (from, to, name) => {
    if (from !== to) {
      if (from) from.classList.remove(name);
      if (to) to.classList.add(name);
    }
    return to;
  };
  const follow = () => {
    const now = player.currentTime + 0.001;  // a seek may end up a rounding error too early
    const spoken = lastBegun(wordTimes, now);
    word = move(word, now <= wordEnds[spoken] + 0.3 ? words[spoken] : null, "on");
    const before = section;
    section = move(section, sections[lastBegun(sectionTimes, now)] || null, "now");
    const free = !player.paused && !search.value && Date.now() > handsOffUntil;
    if (section && section !== before && free) {
      section.scrollIntoView({block: "center", behavior: "smooth"});
    }
  };
  const frame = () => {
    follow();
    if (!player.paused && !player.ended) requestAnimationFrame(frame);
  };
  player.addEventListener("play", frame);
  for (const event of ["timeupdate", "seeking", "seeked"]) player.addEventListener(event, follow);
  for (const event of ["wheel", "touchmove"]) {
    addEventListener(event, () => { handsOffUntil = Date.now() + 5000; }, {passive: true});
  }
  player.addEventListener("error", () => { byId("trouble").hidden = false; });
  if (player.error) byId("trouble").hidden = false;

  // Seeking

  const seek = seconds => {
    player.currentTime = seconds;
    follow();
  };
  const play = () => { player.play().catch(() => {}); };  // the trouble is shown already
  document.querySelector("main").addEventListener("click", event => {
    const link = event.target.closest(".time");
    const part = event.target.closest("[data-t]");
    if (!part || (!link && String(getSelection()))) return;
    if (link) {
      event.preventDefault();
      history.replaceState(null, "", link.hash);
    }
    seek(time(part));
    play();
  });
  const fromAddress = () => {
    const wanted = /^#t=([0-9.]+)$/.exec(location.hash);
    if (!wanted) return;
    seek(Number(wanted[1]));
    const there = sections[lastBegun(sectionTimes, Number(wanted[1]))];
    if (there) there.scrollIntoView({block: "center"});
  };
  addEventListener("hashchange", fromAddress);
  fromAddress();

  // Searching

  const folded = text => {
    const lower = text.toLowerCase();
    return lower.length === text.length ? lower : text;
  };
  let index = null, hits = [], chosen = -1;
  const indexed = () => sections.map(place => {
    const spans = [], begins = [];
    let text = "";
    for (const node of place.querySelector("p").childNodes) {  // words, and the spaces between
      if (node.nodeType === Node.ELEMENT_NODE) {
        spans.push(node);
        begins.push(text.length);
      }
      text += node.textContent;
    }
    return {place, spans, begins, text: folded(text)};
  });
  const find = () => {
    const wanted = folded(search.value.trim());
    for (const hit of hits) for (const span of hit) span.classList.remove("hit");
    hits = [];
    chosen = -1;
    index = index || indexed();
    for (const {place, spans, begins, text} of index) {
      let at = wanted ? text.indexOf(wanted) : -1;
      place.hidden = wanted !== "" && at < 0;
      for (; at >= 0; at = text.indexOf(wanted, at + wanted.length)) {
        const first = lastBegun(begins, at), last = lastBegun(begins, at + wanted.length - 1);
        hits.push(spans.slice(first, last + 1));
      }
    }
    for (const hit of hits) for (const span of hit) span.classList.add("hit");
    found.textContent = wanted ? `${hits.length} found` : "";
  };
  search.addEventListener("input", find);
  search.addEventListener("keydown", event => {
    if (event.key === "Escape") {
      search.value = "";
      find();
    } else if (event.key === "Enter" && hits.length) {
      const step = event.shiftKey ? -1 : 1;
      const from = chosen < 0 && step < 0 ? 0 : chosen;
      chosen = (from + step + hits.length) % hits.length;
      hits[chosen][0].scrollIntoView({block: "center"});
      found.textContent = `${chosen + 1} of ${hits.length}`;
    }
  });
})();
"""


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


POLICY: Final = (
    f"default-src 'none'; script-src {_hash(SCRIPT)}; style-src {_hash(STYLE)}; "
    "media-src 'self' file:; img-src data:; base-uri 'none'; form-action 'none'"
)
"""Of the page's content (CSP): this script, this style sheet, a recording, and no network."""
