"""How is a judge on a server asked?  By the protocol of OpenAI, which most servers of language models speak."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from melbo_lens.arguments import count, public
from melbo_lens.evaluation.judges import Client

DEFAULTS = {"temperature": 0, "max_tokens": 16}


@public
def openai_client(
    model: str,
    base_url: str | None = None,
    *,
    api_key: str | None = None,
    at_once: int = 8,
    max_retries: int = 2,
    **settings: Any,
) -> Client:
    """Makes a client for `judge` of a server that speaks OpenAI's protocol: llama-server, vLLM, a provider.

    What is judged is sent to that server. A request that the `openai` package could not make in the end, after its own
    further tries, is an error of that text alone.

    Args:
        model: the name of the model on the server.
        base_url: the address, such as "http://127.0.0.1:8080/v1"; None is what the `openai` package takes: its
            environment variable OPENAI_BASE_URL, or OpenAI itself.
        api_key: the key; None is the environment variable OPENAI_API_KEY. A server that needs none takes any text.
        at_once: how many requests are open at a time.
        max_retries: how often a request that failed is made again.
        settings: what each request says besides the model and the prompt, over `temperature=0, max_tokens=16`. None
            leaves a setting out, as models that reason want.

    Raises:
        ModuleNotFoundError: the `openai` package is not installed.
    """
    count("at_once", at_once)
    try:
        from openai import OpenAI
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("openai_client needs a package: pip install 'melbo-lens[judge]'.") from error
    server = OpenAI(base_url=base_url, api_key=api_key, max_retries=max_retries)
    said = {name: value for name, value in {**DEFAULTS, **settings}.items() if value is not None}

    def one(prompt: str) -> str | Exception:
        try:
            answer = server.chat.completions.create(
                model=model, messages=[{"role": "user", "content": prompt}], stream=False, **said
            )
            return answer.choices[0].message.content or ""
        except Exception as error:  # of the network, of the server, or of an answer that is no answer
            return error

    def client(prompts: list[str]) -> Sequence[str | Exception]:
        with ThreadPoolExecutor(at_once) as pool:
            return list(pool.map(one, prompts))

    vars(client)["name"] = f"{model} at {server.base_url} with {sorted(said.items())}"
    return client
