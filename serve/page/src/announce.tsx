/** What changes without anybody's doing is said once, politely, to those who listen instead of look. */
import { useEffect, useState } from "preact/hooks";

let say: (words: string) => void = () => {};

export const announce = (words: string): void => say(words);

export function Announcer() {
  const [words, setWords] = useState("");
  useEffect(() => void (say = setWords), []);
  return (
    <p class="unseen" role="status">
      {words}
    </p>
  );
}
