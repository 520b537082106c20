// Opens groups, filters their list. Everything of a run becomes text nodes: no string is read as HTML.
"use strict";

const LIMITS = [0.9, 0.5, 0.2, 0.05]; // probabilities between the five colours
const NAMES = {
  reflection: "Reflection",
  context: "Task prompt again, fed by the program",
  retry: "Retry",
  attempt: "Attempt",
};

function element(tag, className, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children.filter((child) => child !== null && child !== ""));
  return made;
}

function signed(value, digits) {
  return value === null ? "unknown" : (value < 0 ? "\u2212" : "+") + Math.abs(value).toFixed(digits);
}

// --- tokens --------------------------------------------------------------------------------------------------

function tokenClass(turn, logprob) {
  if (turn.role === "context") return "fed";
  const probability = Math.exp(logprob);
  let level = LIMITS.findIndex((limit) => probability >= limit);
  if (level < 0) level = LIMITS.length;
  return (turn.trained ? "t" : "s") + level;
}

function turnBlock(turn) {
  const text = element("pre", "tokens");
  turn.pieces.forEach((piece, i) => {
    const token = element("span", "t " + tokenClass(turn, turn.logprobs[i]), piece);
    if (turn.role !== "context") {
      const percent = (100 * Math.exp(turn.logprobs[i])).toPrecision(2);
      token.title = `${percent}%, log-prob ${turn.logprobs[i].toFixed(2)}`;
    }
    text.append(token);
  });
  if (turn.left_out) text.append(` [... ${turn.left_out} more tokens]`);
  const how = turn.role === "context" ? "" : turn.trained ? ", trained" : ", not trained";
  const label = `${NAMES[turn.role]}${how}${turn.tokens ? `, ${turn.tokens} tokens` : ""}`;
  if (turn.role === "context") {
    return element("details", "context", element("summary", "", label), text);
  }
  return element("div", "", element("p", "turn", label), text);
}

// --- a group ------------------------------------------------------------------------------------------------

function badge(reason) {
  return element("span", "badge " + (reason === "ok" ? "right" : "wrong"), reason === "ok" ? "right" : reason);
}

function episodeBlock(episode) {
  const reward = episode.reward === null ? "unknown" : episode.reward.toFixed(2);
  const head = element(
    "p",
    "head",
    ...episode.reasons.flatMap((reason) => [badge(reason), " "]),
    element("span", "num", `reward ${reward}`),
    element("span", "num", `advantage ${signed(episode.advantage, 2)}`),
    episode.cut ? element("span", "muted", "cut at its limit") : "",
  );
  const sign = episode.advantage > 0 ? "positive" : episode.advantage < 0 ? "negative" : "zero";
  const block = element("article", "episode " + sign, head, ...episode.turns.map(turnBlock));
  if (episode.retries) {
    block.append(element("p", "turn", "All retries"), element("pre", "", episode.retries));
  }
  return block;
}

function groupBody(group) {
  const body = element("div", "body");
  if (group.prompt) body.append(element("p", "turn", "Prompt"), element("pre", "", group.prompt));
  if (group.attempt) body.append(element("p", "turn", "Failed attempt"), element("pre", "", group.attempt));
  body.append(...group.episodes.map(episodeBlock));
  if (group.left_out) body.append(element("p", "muted", `${group.left_out} more completions are left out.`));
  return body;
}

function toggle(button) {
  const body = document.getElementById(button.id + "-body");
  const open = button.getAttribute("aria-expanded") !== "true";
  if (open && !body.hasChildNodes()) {
    body.append(groupBody(JSON.parse(document.getElementById(button.id + "-data").textContent)));
  }
  button.setAttribute("aria-expanded", String(open));
  body.hidden = !open;
}

// --- the filter ---------------------------------------------------------------------------------------------

function chosen(name) {
  const select = document.getElementById("filter-" + name);
  return select ? select.value : "";
}

function matches(row, run, verdict, step) {
  if ((run && row.dataset.run !== run) || (step && row.dataset.step !== step)) return false;
  if (verdict.startsWith("v:")) return row.dataset.verdict === verdict.slice(2);
  if (verdict.startsWith("r:")) return JSON.parse(row.dataset.reasons).includes(verdict.slice(2));
  return true;
}

function filter() {
  const rows = [...list.children];
  const [run, verdict, step] = ["run", "verdict", "step"].map(chosen);
  for (const row of rows) row.hidden = !matches(row, run, verdict, step);
  const shown = rows.filter((row) => !row.hidden).length;
  const count = document.getElementById("filter-count");
  count.textContent = shown === rows.length ? `${shown} groups` : `${shown} of ${rows.length} groups`;
}

const list = document.getElementById("group-list");
if (list) {
  list.addEventListener("click", (event) => {
    const button = event.target.closest("button.group");
    if (button) toggle(button);
  });
  for (const name of ["run", "verdict", "step"]) {
    document.getElementById("filter-" + name)?.addEventListener("change", filter);
  }
  filter(); // a browser may have kept the choices of an earlier visit
}
