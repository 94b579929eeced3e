"""A catalog folder as an object: features by index, search, page, publish.

Opening reads `catalog.json` and `features.parquet`; every other file is read, and of a catalog on the hub downloaded,
when it is first asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import pyarrow as pa
from torch import Tensor

from saekit import embedded
from saekit.catalog.feature import Context, Feature
from saekit.catalog.said import Said
from saekit.catalog.tables import CATALOG, DIRECTIONS, SCHEMA_VERSION, SCHEMAS, ByFeature, read_table
from saekit.errors import FileMissing, InvalidInput, UnknownFeature
from saekit.files import existing, read_json, read_tensors
from saekit.sae import SAE
from saekit.sae.files import assemble, from_cfg

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType
    from transformer_lens.model_bridge import TransformerBridge

    from saekit.catalog.difference import Difference
    from saekit.catalog.firing import Firing
    from saekit.catalog.relations import By, Neighbour, Raises
    from saekit.catalog.search import Index, Sort
    from saekit.steering.directions import Direction

SAYING = ("explanations", "scores")  # the tables that change after the build


class Catalog:
    """Features of one SAE over one corpus. Make one with `Catalog.build`, open one with `Catalog.open`."""

    def __init__(self, path: Path, repository: str | None = None) -> None:
        """path: the folder. repository: of the hub's dataset whose snapshot the folder is; what it lacks is fetched."""
        self.path, self._repository = path, repository
        self.info = read_json(existing(path / CATALOG, "catalog"))
        if self.info.get("schema") != SCHEMA_VERSION:
            raise InvalidInput(
                f"{path / CATALOG}: schema {self.info.get('schema')!r}; this saekit reads {SCHEMA_VERSION}, and "
                "`saekit catalog build` makes it"
            )
        try:
            self.site: str = self.info["site"]
            self.target_site: str = self.info[
                "target_site"
            ]  # where directions act: the site, unless of a transcoder
            self.model_name: str = self.info["model"]["name"]
            self.median_norm: float = float(self.info["median_norm"])
            self.sink_norm: float = float(self.info["sinks"]["norm_above"])  # in multiples of the median norm
            self.d_sae: int = self.info["sae"]["d_sae"]
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInput(f"{path / CATALOG}: field {error} is missing or wrong") from error
        self._features = {
            name: column.to_numpy() if column.type != pa.string() else column.to_pylist()
            for name, column in zip(SCHEMAS["features"].names, self.table("features").columns, strict=True)
        }
        if len(self._features["feature"]) != self.d_sae:
            raise InvalidInput(
                f"{path}/features.parquet: {len(self._features['feature'])} rows for {self.d_sae} latents"
            )
        self._tables: dict[str, ByFeature] = {}
        self._read: tuple[Any, Said] | None = None
        self._indexed: tuple[Said, Index] | None = None

    @overload
    @classmethod
    def build(
        cls,
        model: TransformerBridge,
        sae: SAE | Sequence[SAE],
        tokens: Any,
        folder: str | Path,
        *,
        part: tuple[int, int],
        **options: Any,
    ) -> Path: ...
    @overload
    @classmethod
    def build(
        cls, model: TransformerBridge, sae: SAE, tokens: Any, folder: str | Path, **options: Any
    ) -> Catalog: ...
    @overload
    @classmethod
    def build(
        cls, model: TransformerBridge, sae: Sequence[SAE], tokens: Any, folder: str | Path, **options: Any
    ) -> list[Catalog]: ...
    @classmethod
    def build(
        cls, model: TransformerBridge, sae: Any, tokens: Any, folder: str | Path, **options: Any
    ) -> Catalog | list[Catalog] | Path:
        """Build a catalog in one pass over the tokens, or one for each of several SAEs; options as in
        `catalog.build.build`. Features are explained and scored without a language model (`explain.without_llm`). A part gives
        its folder, for `Catalog.merge`."""
        from saekit.catalog.build import build

        made = build(model, sae, tokens, folder, **options)
        return made if isinstance(made, Path) and options.get("part") else cls._made(made)

    @classmethod
    def merge(cls, parts: Iterable[str | Path], folder: str | Path) -> Catalog | list[Catalog]:
        """The catalog, or of several SAEs the catalogs, of parts that were built apart; see `catalog.parts.merge`."""
        from saekit.catalog.parts import merge

        return cls._made(merge(parts, folder))

    @classmethod
    def _made(cls, folders: Path | list[Path]) -> Catalog | list[Catalog]:
        from saekit.catalog.explain import without_llm

        for folder in [folders] if isinstance(folders, Path) else folders:
            without_llm(folder)
        return cls(folders) if isinstance(folders, Path) else [cls(folder) for folder in folders]

    @classmethod
    def open(cls, source: str | Path) -> Catalog:
        """Open a folder, `"tiny"` (embedded), or a hub dataset id.

        Raises `FileMissing` where there is none, `InvalidInput` for a broken or newer one.
        """
        folder = Path(source)
        if str(source) == embedded.NAME and not folder.is_dir():
            folder = embedded.folder("catalog")
        elif (
            not folder.exists()
            and isinstance(source, str)
            and source.count("/") == 1
            and source[0] not in "./~"
        ):
            from saekit.catalog.publish import fetch

            return cls(fetch(source, CATALOG).parent, source)
        existing(folder, "catalog")
        if not (folder / CATALOG).exists():
            raise FileMissing(f"catalog {folder}: no {CATALOG} in it; `saekit catalog build` makes one")
        return cls(folder)

    def _file(self, name: str) -> Path:
        """Where a file of the catalog lies, fetched first where this is a snapshot of the hub that lacks it."""
        path = self.path / name
        if self._repository is not None and not path.exists():
            from saekit.catalog.publish import fetch

            return fetch(self._repository, name, revision=self.path.name)  # a snapshot is named by its commit
        return path

    def __len__(self) -> int:
        return self.d_sae

    def __iter__(self) -> Iterator[Feature]:
        return (self[i] for i in range(self.d_sae))

    def __getitem__(self, index: int) -> Feature:
        """The record of a feature. Raises `UnknownFeature` (a `KeyError` and an `IndexError`)."""
        if (
            isinstance(index, (bool, float, str))
            or not isinstance(index, (int, np.integer))
            or not 0 <= index < self.d_sae
        ):
            raise UnknownFeature(f"feature {index!r}: this catalog has features 0 … {self.d_sae - 1}")
        i = int(index)
        columns = self._features
        return Feature(
            index=i,
            density=float(columns["density"][i]),
            max_activation=float(columns["max_activation"][i]),
            mean_activation=float(columns["mean_activation"][i]),
            label=columns["label"][i],
            catalog=self,
        )

    def __repr__(self) -> str:
        corpus = self.info["corpus"]
        return f"Catalog({self.d_sae} features of {self.model_name} at {self.site}, {corpus['tokens']:,} tokens of {corpus['label']})"

    def _repr_html_(self) -> str:
        from saekit.display.catalog import catalog_html

        return catalog_html(self)

    def __rich__(self) -> RenderableType:
        from saekit.display.catalog import catalog_text

        return catalog_text(self)

    def _repr_pretty_(self, p: Any, cycle: bool) -> None:
        """IPython's: coloured in a terminal, as `print` has it elsewhere."""
        from saekit.display.terminal import pretty

        pretty(self, p)

    def figure(self) -> Figure:
        """A matplotlib figure: how often the features fire, and how well they are explained."""
        from saekit.catalog.figure import catalog_figure

        return catalog_figure(self)

    @property
    def density(self) -> np.ndarray:
        """[S] share of tokens on which each feature fires."""
        return self._features["density"]

    @property
    def max_activation(self) -> np.ndarray:
        """[S] largest activation of each feature."""
        return self._features["max_activation"]

    @property
    def score(self) -> np.ndarray:
        """[S] how well the explanation shown of each feature predicts it (see `Explanation.score`); NaN without a score."""
        return self._said.score

    @cached_property
    def sae(self) -> SAE:
        """The SAE that the catalog describes, from `directions.safetensors`."""
        config = from_cfg(self.info["sae"], str(self.path / CATALOG))
        path = existing(self._file(DIRECTIONS), "directions")
        return assemble(config, read_tensors(path), str(path)).requires_grad_(False)

    @cached_property
    def vocabulary(self) -> list[str]:
        """The text of every token id, spaces kept."""
        return self.table("vocabulary")["token"].to_pylist()

    def token(self, token_id: int) -> str:
        """The text of a token id, spaces kept. Raises `InvalidInput` for an id that the vocabulary lacks."""
        if not 0 <= token_id < len(self.vocabulary):
            raise InvalidInput(f"{self.path}: token id {token_id} is not in vocabulary.parquet")
        return self.vocabulary[token_id]

    def table(self, name: str) -> pa.Table:
        """A whole table as Arrow: `features`, `contexts`, `tokens`, `logits`, … (`.to_pandas()`, or SQL through DuckDB)."""
        if name not in SCHEMAS:
            raise InvalidInput(f"table {name!r} is not one of {', '.join(SCHEMAS)}")
        return read_table(self._file(f"{name}.parquet").parent, name)

    # Asking

    def search(
        self,
        query: str = "",
        limit: int = 20,
        *,
        min_density: float | None = None,
        max_density: float | None = None,
        min_max_activation: float | None = None,
        max_max_activation: float | None = None,
        min_score: float | None = None,
        sort: Sort = "relevance",
        reverse: bool = False,
    ) -> list[Feature]:
        """Features for words, best first: by the share of their activation on matching tokens, the tokens their
        direction raises, and their explanations. Without words, all features that pass the filters.

        min_…, max_…: bounds, both included. sort: `relevance`, `density`, `max_activation` and `score` from the highest
        down, `index` from 0 up; reverse: the other way. Raises `InvalidInput` for a query without a word in it, and
        for no query where there is no filter and no sort either.
        """
        from saekit.catalog.search import search

        found = search(
            self,
            query,
            limit=limit,
            min_density=min_density,
            max_density=max_density,
            min_max_activation=min_max_activation,
            max_max_activation=max_max_activation,
            min_score=min_score,
            sort=sort,
            reverse=reverse,
        )
        return [self[i] for i in found]

    def firing(self, text: str, model: TransformerBridge | None = None, *, limit: int = 12) -> Firing:
        """Which features fire on each token of a text, the strongest `limit`. model: the one the catalog was built on,
        loaded by its name where none is given.

        Raises `InvalidInput` for another model, or a text longer than its context.
        """
        from saekit.catalog.firing import firing
        from saekit.lm import load_model

        model = load_model(self.model_to_load) if model is None else model
        self.check_fits(model)
        return firing(model, self.sae, text, limit)

    def nearest(self, of: int | Tensor | Direction, by: By = "decoder", limit: int = 10) -> list[Neighbour]:
        """What is nearest to a feature, or to a direction [D]: by `"decoder"`, cosine of the decoder rows; by `"firing"`,
        the Jaccard index of the tokens on which both fire (features only, as many as the catalog holds).

        Raises `UnknownFeature`, and `InvalidInput` for a direction of another width.
        """
        from saekit.catalog.relations import nearest
        from saekit.steering.directions import Direction

        return nearest(self, of.vector if isinstance(of, Direction) else of, by, limit)

    def raising(
        self, token: str | int, limit: int = 20, model: TransformerBridge | None = None
    ) -> list[Raises]:
        """Features whose direction raises a token's logit, the most first: `" lightsaber"`, or its id.

        Without a model, among the features that have the token in their stored top; with the one the catalog was
        built on, among all. Raises `UnknownName` for a text that is no single token.
        """
        from saekit.catalog.relations import raising

        return raising(self, token, limit, model)

    def difference(self, other: Catalog, by: By | None = None, *, threshold: float = 0.7) -> Difference:
        """Which features match those of another catalog; see `difference.difference`."""
        from saekit.catalog.difference import difference

        return difference(self, other, by, threshold=threshold)

    @property
    def _index(self) -> Index:
        from saekit.catalog.search import Index

        said = self._said
        if self._indexed is None or self._indexed[0] is not said:
            self._indexed = said, Index(self)
        return self._indexed[1]

    @property
    def _said(self) -> Said:
        """Explanations and scores, read again when somebody has written to them since."""
        stats = [existing(self._file(f"{name}.parquet"), f"catalog table {name}").stat() for name in SAYING]
        stamp = tuple((stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in stats)
        if self._read is None or self._read[0] != stamp:
            self._read = stamp, Said(self.table("explanations"), self.table("scores"), self.d_sae)
        return self._read[1]

    def page(
        self,
        folder: str | Path,
        *,
        prompts: Sequence[str] | None = None,
        model: TransformerBridge | None = None,
        features: Sequence[int] | None = None,
    ) -> Path:
        """Write the catalog as a static page that opens from disk and from any web server; returns its place.

        folder: a new folder, or one that holds an earlier page; or a path that ends in `.html`: one file that holds the
        chosen `features` (at most 200) and nothing else, to attach to a mail. prompts: texts to show what fires on, token
        by token, before those of the catalog's own sample. model: the one the catalog was built on, for the prompts;
        loaded by its name where none is given.

        Raises `InvalidInput` for a place that holds anything else, a file without features or with too many, another
        model; `UnknownFeature`.
        """
        from saekit.catalog.page import write_page

        return write_page(self, Path(folder), prompts=prompts, model=model, features=features)

    def publish(
        self,
        repository: str,
        *,
        private: bool = False,
        wandb: bool = False,
        licence: str | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> str:
        """Upload to the Hugging Face Hub as a dataset with a card; returns its address.

        wandb: log it as an artifact too. licence: of the corpus. metrics: the SAE's evaluation, for the card.
        """
        from saekit.catalog.publish import publish

        return publish(self, repository, private=private, wandb=wandb, licence=licence, metrics=metrics)

    def artifact(
        self, *, name: str | None = None, project: str = "saekit", entity: str | None = None, run: Any = None
    ) -> str | None:
        """Log the files as a W&B artifact, with a table of features; its name, or None where W&B is switched off."""
        from saekit.catalog.artifact import artifact

        return artifact(self, name=name, project=project, entity=entity, run=run)

    @property
    def model_to_load(self) -> str:
        """The name to load the model by. Raises `InvalidInput` where it was a folder on the machine of who published."""
        if self.info["model"].get("local"):
            raise InvalidInput(
                f"catalog {self.path}: built on a model from a local folder, {self.model_name!r}; give your copy of it "
                "(model=, --model)"
            )
        return self.model_name

    def check_fits(self, model: TransformerBridge) -> None:
        """Raises `InvalidInput` unless the model is the one this catalog was built on."""
        from saekit.lm import model_hash, tokenizer_hash

        self.sae.check_fits(model)
        described = self.info["model"]
        if described["tokenizer_hash"] != tokenizer_hash(model.tokenizer):
            raise InvalidInput(
                f"catalog {self.path}: {model.cfg.model_name} has another tokenizer than {self.model_name}"
            )
        if described["hash"] != model_hash(model):
            raise InvalidInput(
                f"catalog {self.path}: the weights of {model.cfg.model_name} are not those of {self.model_name}"
            )

    # Rows of one feature, for `Feature`

    def _rows(self, table: str, feature: int) -> dict[str, Any]:
        if table not in self._tables:
            self._tables[table] = ByFeature(self.table(table))
        # Of the column's own type: an int would have all of the column converted.
        return self._tables[table].rows(feature)

    @cached_property
    def _corpus(self) -> tuple[np.ndarray, np.ndarray]:
        """(token ids of all rows in one array, where each row starts)."""
        table = self.table("corpus")
        rows = table["row"].to_numpy()
        starts = np.searchsorted(rows, np.arange(rows[-1] + 2 if len(rows) else 1, dtype=rows.dtype))
        ids = table["token_id"].to_numpy()
        for i in (ids.min(initial=0), ids.max(initial=0)):
            self.token(int(i))  # all of them are in the vocabulary
        return ids, starts

    def _contexts(self, feature: int, band: int) -> list[Context]:
        contexts, firings = self._rows("contexts", feature), self._rows("activations", feature)
        ids, starts = self._corpus
        vocabulary = self.vocabulary
        own = firings["band"] == band
        ranks, offsets, values = (firings[name][own] for name in ("rank", "offset", "activation"))
        found = []
        for i in np.flatnonzero(contexts["band"] == band):
            row, start, length = (int(contexts[name][i]) for name in ("row", "start", "length"))
            begin = int(starts[row]) + start
            token_ids = ids[begin : begin + length].tolist()
            activations = np.zeros(length)
            here = ranks == contexts["rank"][i]
            activations[offsets[here]] = values[here]
            norm = float(contexts["norm"][i])
            found.append(
                Context(
                    tokens=[vocabulary[i] for i in token_ids],
                    activations=activations.tolist(),
                    peak=int(contexts["peak"][i]),
                    document=int(contexts["document"][i]),
                    norm=norm,
                    sink=norm > self.sink_norm,
                    token_ids=token_ids,
                )
            )
        return found
