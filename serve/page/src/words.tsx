/** The objects that a small prior knows, to pick from, and a gentle note where a prompt names none of them. */
import { useState } from "preact/hooks";

const NUM_SHOWN = 14;

interface Props {
  words: string[] | null;
  prompt: string;
  setPrompt: (prompt: string) => void;
}

export function Words({ words, prompt, setPrompt }: Props) {
  const [all, setAll] = useState(false);
  if (!words?.length) return null;
  const begun = /\S*$/.exec(prompt.toLowerCase())![0];
  const meant = begun.length > 1 && !words.includes(begun) ? words.filter((word) => word.startsWith(begun)) : [];
  const choices = meant.length ? meant : words;

  /** Ends the word that was begun, or adds one. */
  function pick(word: string) {
    const before = (meant.length ? prompt.slice(0, prompt.length - begun.length) : prompt).trim();
    setPrompt(before ? `${before} ${word}` : `a ${word}`);
    document.getElementById("prompt")?.focus();
  }

  return (
    <div class="words">
      <ul role="list" aria-label="Objects that this prior knows">
        {(all ? choices : choices.slice(0, NUM_SHOWN)).map((word) => (
          <li key={word}>
            <button type="button" class="chip" onClick={() => pick(word)}>
              {word}
            </button>
          </li>
        ))}
        {choices.length > NUM_SHOWN && (
          <li>
            <button type="button" class="chip more" aria-expanded={all} onClick={() => setAll(!all)}>
              {all ? "Fewer" : `All ${choices.length}`}
            </button>
          </li>
        )}
      </ul>
      <p class="hint" aria-live="polite">
        {prompt.trim().length > 2 && !meant.length && !namesOneOf(prompt, words) && "This prior knows none of these words."}
      </p>
    </div>
  );
}

/** Also in the plural, and also where an object's name has several words. */
function namesOneOf(prompt: string, words: string[]): boolean {
  const text = ` ${prompt.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, " ")}`;
  return words.some((word) => text.includes(` ${word.toLowerCase()}`));
}
