"""Engines of others that speak OpenAI's protocol: how each is started, and where it tells that it is well.

In a command `{model}` is what it loads, `{name}` the model's name here, `{host}` and `{port}` where it must listen.
"""

from msgspec import Struct

from fairlead.backends.base import Kind
from fairlead.core.specs import Isolation


class ExternalEngine(Struct, frozen=True, kw_only=True):
    """A row of the table."""

    name: str
    """As `backend` of model.yaml."""
    command: tuple[str, ...] = ()
    """(): there is none, `engine.url` or `engine.command` says what to ask."""
    health: str = "/health"
    """Answers 200 once it takes requests."""
    metrics: str = "/metrics"
    """Its own; "" for none."""
    key_variable: str = ""
    """Of its environment: the key that it then asks for. Nobody on the machine but this server can use one that has it."""
    extended: bool = False
    """It takes vLLM's sampling parameters beside OpenAI's."""
    files: tuple[str, ...] = ()
    """What its artefact is, where it is one file; (): a checkpoint's folder."""


ENGINES: dict[str, ExternalEngine] = {
    row.name: row
    for row in (
        ExternalEngine(
            name="vllm",
            command=(
                *("python", "-m", "vllm.entrypoints.openai.api_server", "--model", "{model}", "--served-model-name", "{name}"),
                *("--host", "{host}", "--port", "{port}", "--disable-uvicorn-access-log"),
            ),
            key_variable="VLLM_API_KEY",
            extended=True,
        ),
        ExternalEngine(
            name="sglang",
            command=(
                *("python", "-m", "sglang.launch_server", "--model-path", "{model}", "--served-model-name", "{name}"),
                *("--host", "{host}", "--port", "{port}"),
            ),
            extended=True,
        ),
        ExternalEngine(
            name="tensorrt_llm",
            command=("trtllm-serve", "{model}", "--host", "{host}", "--port", "{port}"),
        ),
        ExternalEngine(
            name="tgi",
            command=(
                *("text-generation-launcher", "--model-id", "{model}", "--hostname", "{host}", "--port", "{port}"),
                *("--shard-uds-path", "/tmp/text-generation-server-{port}"),
            ),
            key_variable="API_KEY",
        ),
        ExternalEngine(
            name="llama_cpp",
            command=("llama-server", "--model", "{model}", "--alias", "{name}", "--host", "{host}", "--port", "{port}", "--metrics"),
            key_variable="LLAMA_API_KEY",
            files=(".gguf",),
        ),
        ExternalEngine(name="openai", health="", metrics=""),
    )
}

KINDS = tuple(
    Kind(
        name=row.name,
        module="",
        requires=(),
        extra="",
        isolation=Isolation.PROCESS,
        files=row.files,
        engine=True,
        external=True,
    )
    for row in ENGINES.values()
)
