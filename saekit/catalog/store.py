"""A catalog folder as an object: features by index, search, page, publish.

Opening reads `catalog.json` and `features.parquet`; every other table is read when it is first asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from saekit import embedded
from saekit.catalog.feature import Context, Feature
from saekit.catalog.tables import CATALOG, DIRECTIONS, SCHEMA_VERSION, SCHEMAS, ByFeature, read_table
from saekit.errors import FileMissing, InvalidInput, UnknownFeature
from saekit.files import existing, read_json, read_tensors
from saekit.sae import SAE
from saekit.sae.files import assemble, from_cfg

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


class Catalog:
    """Features of one SAE over one corpus. Make one with `Catalog.build`, open one with `Catalog.open`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.info = read_json(existing(path / CATALOG, "catalog"))
        if self.info.get("schema") != SCHEMA_VERSION:
            raise InvalidInput(
                f"{path / CATALOG}: schema {self.info.get('schema')!r}; this saekit reads {SCHEMA_VERSION}"
            )
        try:
            self.site: str = self.info["site"]
            self.model_name: str = self.info["model"]["name"]
            self.median_norm: float = float(self.info["median_norm"])
            self.d_sae: int = self.info["sae"]["d_sae"]
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInput(f"{path / CATALOG}: field {error} is missing or wrong") from error
        self._features = {
            name: column.to_numpy() if column.type != pa.string() else column.to_pylist()
            for name, column in zip(
                SCHEMAS["features"].names, read_table(path, "features").columns, strict=True
            )
        }
        if len(self._features["feature"]) != self.d_sae:
            raise InvalidInput(
                f"{path}/features.parquet: {len(self._features['feature'])} rows for {self.d_sae} latents"
            )
        self._tables: dict[str, ByFeature] = {}

    @classmethod
    def build(
        cls, model: TransformerBridge, sae: SAE, tokens: Any, folder: str | Path, **options: Any
    ) -> Catalog:
        """Build a catalog in one pass over the tokens; options as in `catalog.build.build`."""
        from saekit.catalog.build import build

        return cls(build(model, sae, tokens, folder, **options))

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

            folder = fetch(source)
        existing(folder, "catalog")
        if not (folder / CATALOG).exists():
            raise FileMissing(f"catalog {folder}: no {CATALOG} in it; `saekit catalog build` makes one")
        return cls(folder)

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

    @property
    def density(self) -> np.ndarray:
        """[S] share of tokens on which each feature fires."""
        return self._features["density"]

    @property
    def max_activation(self) -> np.ndarray:
        """[S] largest activation of each feature."""
        return self._features["max_activation"]

    @cached_property
    def sae(self) -> SAE:
        """The SAE that the catalog describes, from `directions.safetensors`."""
        config = from_cfg(self.info["sae"], str(self.path / CATALOG))
        path = self.path / DIRECTIONS
        return assemble(config, read_tensors(path), str(path)).requires_grad_(False)

    @cached_property
    def _vocabulary(self) -> list[str]:
        return read_table(self.path, "vocabulary")["token"].to_pylist()

    def token(self, token_id: int) -> str:
        """The text of a token id, spaces kept. Raises `InvalidInput` for an id that the vocabulary lacks."""
        if not 0 <= token_id < len(self._vocabulary):
            raise InvalidInput(f"{self.path}: token id {token_id} is not in vocabulary.parquet")
        return self._vocabulary[token_id]

    def table(self, name: str) -> pa.Table:
        """A whole table as Arrow: `features`, `contexts`, `tokens`, `logits`, … (`.to_pandas()`, or SQL through DuckDB)."""
        if name not in SCHEMAS:
            raise InvalidInput(f"table {name!r} is not one of {', '.join(SCHEMAS)}")
        return read_table(self.path, name)

    def search(self, query: str, limit: int = 20) -> list[Feature]:
        """Features for words, best first: by the share of their activation on matching tokens, the tokens their
        direction raises, and their explanations. Raises `InvalidInput` for a query without a word in it."""
        return [self[i] for i in self._index.search(query, limit)]

    @cached_property
    def _index(self) -> Any:
        from saekit.catalog.search import Index

        return Index(self)

    def page(self, folder: str | Path) -> Path:
        """Write the catalog as a static page that opens from disk and from any web server."""
        from saekit.catalog.page import write_page

        return write_page(self, Path(folder))

    def publish(self, repository: str, *, private: bool = False) -> str:
        """Upload to the Hugging Face Hub as a dataset with a card; returns its address."""
        from saekit.catalog.publish import publish

        return publish(self, repository, private=private)

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
            self._tables[table] = ByFeature(read_table(self.path, table))
        return self._tables[table].rows(feature)

    @cached_property
    def _corpus(self) -> tuple[np.ndarray, np.ndarray]:
        """(token ids of all rows in one array, where each row starts)."""
        table = read_table(self.path, "corpus")
        rows = table["row"].to_numpy()
        starts = np.searchsorted(rows, np.arange(rows[-1] + 2 if len(rows) else 1))
        return table["token_id"].to_numpy(), starts

    def _contexts(self, feature: int) -> list[Context]:
        contexts, firings = self._rows("contexts", feature), self._rows("activations", feature)
        ids, starts = self._corpus
        found = []
        for rank, row, start, length, peak, document in zip(
            *(contexts[name] for name in ("rank", "row", "start", "length", "peak", "document")), strict=True
        ):
            begin = int(starts[row]) + int(start)
            token_ids = ids[begin : begin + int(length)].tolist()
            activations = np.zeros(int(length))
            here = firings["rank"] == rank
            activations[firings["offset"][here]] = firings["activation"][here]
            tokens = [self.token(i) for i in token_ids]
            found.append(Context(tokens, activations.tolist(), int(peak), int(document), token_ids))
        return found
