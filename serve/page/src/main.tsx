/** The page: a frame around the front page (order form and gallery) or one generation. */
import { render } from "preact";
import { useCallback, useEffect, useRef, useState } from "preact/hooks";
import { onKeyNeeded } from "./api";
import { Composer } from "./composer";
import { Gallery } from "./gallery";
import { GenerationView } from "./generation";
import { useRoute } from "./hooks";
import { KeyDialog, type KeyQuestion } from "./key_dialog";
import { Announcer } from "./announce";
import { ThemeButton } from "./theme";

function Front() {
  return (
    <>
      <Composer />
      <Gallery />
    </>
  );
}

function Page() {
  const id = useRoute();
  const [question, setQuestion] = useState<KeyQuestion | null>(null);
  const main = useRef<HTMLElement>(null);
  const first = useRef(true);

  useEffect(() => {
    onKeyNeeded((refused) => new Promise((answer) => setQuestion({ refused, answer })));
  }, []);
  useEffect(() => {
    if (!id) document.title = "raydream";
    if (!first.current) main.current?.querySelector("h1")?.focus(); // a new view is read out from its heading
    first.current = false;
    scrollTo(0, 0);
  }, [id]);
  const answered = useCallback((key: string) => (question?.answer(key), setQuestion(null)), [question]);

  return (
    <>
      <a class="skip" href="#main" onClick={(event) => (event.preventDefault(), main.current?.focus())}>
        Skip to content
      </a>
      <header class="top">
        <a class="brand" href="#/" aria-current={id ? undefined : "page"}>
          <Mark /> raydream
        </a>
        <ThemeButton />
      </header>
      <main id="main" ref={main} tabIndex={-1}>
        {id ? <GenerationView key={id} id={id} /> : <Front />}
      </main>
      <footer>
        <a href="/openapi.json">API</a> · one prompt, several different 3D models
      </footer>
      <Announcer />
      {question && <KeyDialog refused={question.refused} answered={answered} />}
    </>
  );
}

function Mark() {
  return (
    <svg class="mark" viewBox="0 0 32 32" aria-hidden="true">
      <path d="M16 3.5 27 9.8v12.4L16 28.5 5 22.2V9.8z" />
      <path d="m5 9.8 11 6.3 11-6.3M16 16.1v12.4" />
    </svg>
  );
}

render(<Page />, document.getElementById("app")!);
