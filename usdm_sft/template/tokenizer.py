"""Tokenizers with tokens for units: USTM's, which the reference uses, and those of other base models.

USTM's is Mistral-7B-v0.1's vocabulary in its legacy form, then 10,003 tokens for units and turns. Legacy means that every run of
text between special tokens gets a leading "▁" and keeps its spaces. `AutoTokenizer` of transformers 5 rebuilds the tokenizer and
loses that silently; `PreTrainedTokenizerFast` keeps the pipeline of tokenizer.json. `check_tokenizer` therefore checks every
loaded tokenizer that has USTM's ids.

transformers is imported inside the functions that need it: readers of a dataset folder use only the constants.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from usdm_sft.template.chat import ChatIds
from usdm_sft.template.config import MAX_LENGTH, MAX_UNITS, OFFLINE, USTM
from usdm_sft.template.special_tokens import (
    CONTINUE_TOKEN,
    CORRESPOND_TOKEN,
    OR_OFFLINE,
    TemplateTokens,
    find_newline,
    naming_errors,
    read_tokens,
    unit_token,
    without_padding,
)
from usdm_sft.utils.files import describe_bad_json, is_html
from usdm_sft.utils.hub import hub_errors, only_cached
from usdm_sft.utils.texts import first_line

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from transformers import PreTrainedTokenizerFast


UNK, BOS, EOS = 0, 1, 2
NEWLINE = 13  # <0x0A>, the token of every newline
SPACE = 28705  # a single "▁"
CONTINUE, CORRESPOND, UNIT_0 = 32000, 32001, 32002
NUM_UNITS = 10_000

_BASE_MODEL = "base_model"  # in tokenizer_config.json
_MISTRALS = re.compile("mistral|ustm", re.IGNORECASE)  # names of tokenizers in whose place USTM's can be
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)

MODEL_SHA256 = "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055"

# Strings, their ids with naver-ai/USTM in transformers 4.40.2, and the meaning of other ids.
_NOT_MISTRAL = "its vocabulary is not that of Mistral-7B-v0.1"
_NOT_LEGACY = (
    "it is not in the legacy form: after a special token the leading '▁' is missing "
    "(today's mistralai/Mistral-7B-v0.1, or a tokenizer whose `legacy` is false)"
)
_REBUILT = (
    "it was rebuilt (by AutoTokenizer or LlamaTokenizer of transformers 5), which drops the leading '▁' before a space"
)
_PROBES = (
    ("Below is a conversation between the user and the agent.",
     [20811, 349, 264, 7114, 1444, 272, 2188, 304, 272, 8073, 28723], _NOT_MISTRAL),
    ("<|correspond|>yes<|correspond|>", [CORRESPOND, 5081, CORRESPOND], _NOT_LEGACY),
    ("<|unit0|>\n</s>", [UNIT_0, SPACE, NEWLINE, EOS], _NOT_LEGACY),
    (" yes", [SPACE, 5081], _REBUILT),
    ("     x", [355, 1318], _REBUILT),
)  # fmt: skip


def load_tokenizer(
    name_or_path: str | Path = USTM,
    model_cache_dir: str | Path | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    subfolder: str | None = None,
    repo_type: Literal["model", "dataset"] = "model",
) -> PreTrainedTokenizerFast:
    """Load a tokenizer with tokens for units, and check its ids.

    A tokenizer that has the ids of USTM's tokens must give the reference's ids for texts as well.

    Args:
        name_or_path: A repository of the Hub, a folder, or "mistral-common" for USTM's tokenizer, built offline.
        model_cache_dir: Folder for downloads; the Hub's own cache by default.
        revision: Branch, tag or commit of the repository; its main branch by default.
        token: Token of the Hub, for a private repository; by default HF_TOKEN, or the one that `hf auth login` saved.
        subfolder: Folder of the tokenizer inside the repository or the folder, such as "tokenizer" in a dataset folder.
        repo_type: "dataset" for a repository that `push` filled: `load_tokenizer("USER/NAME", subfolder="tokenizer",
            repo_type="dataset")`.

    Raises:
        OSError: The tokenizer cannot be found or downloaded.
        ValueError: The tokenizer cannot be opened, has no tokens for units, or gives other ids; the message says why.
    """
    if str(name_or_path) == OFFLINE:
        return build_tokenizer()
    hub = {"cache_dir": model_cache_dir, "revision": revision, "token": token, "repo_type": repo_type}
    place = f"{name_or_path}/{subfolder}" if subfolder else str(name_or_path)
    instead = OR_OFFLINE if _MISTRALS.search(Path(name_or_path).name) else ""
    tokenizer = _open_tokenizer(str(name_or_path), subfolder, hub, instead=instead)
    with naming_errors(place, instead):
        if is_ustm(tokenizer.backend_tokenizer):
            check_tokenizer(tokenizer.backend_tokenizer, place)
        else:
            read_tokens(tokenizer, place)
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save a tokenizer so that `AutoTokenizer` of transformers 4 and 5 opens it as it is.

    transformers 5 writes the class `TokenizersBackend`, which transformers 4 does not know. Under `PreTrainedTokenizerFast`, both
    take the pipeline of tokenizer.json; under `LlamaTokenizerFast`, transformers 5 would build another one.

    Raises:
        OSError: A file cannot be written.
    """
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        if type(error) is Exception:  # what tokenizers raises, for a full disk as well
            raise OSError(f"the tokenizer cannot be written to {folder}: {error}") from error
        raise
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):  # transformers 4 has another name for it
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def is_ustm(tokenizer: Tokenizer) -> bool:
    """True if the tokens that USTM adds have USTM's ids; `build_tokenizer` puts them in another order for other bases."""
    expected = {CONTINUE_TOKEN: CONTINUE, CORRESPOND_TOKEN: CORRESPOND, unit_token(0): UNIT_0}
    return all(tokenizer.token_to_id(token) == token_id for token, token_id in expected.items())


def check_tokenizer(tokenizer: Tokenizer, name: str = "this tokenizer") -> TemplateTokens:
    """Check that a tokenizer is USTM's: that it gives the reference's ids for a few strings.

    Args:
        tokenizer: The tokenizer; its padding and truncation do not matter.
        name: Its name in error messages.

    Returns:
        The ids of the template.

    Raises:
        ValueError: An id differs.
    """
    tokenizer = without_padding(tokenizer)
    remedy = (
        f"load naver-ai/USTM, or a folder that this package saved, with load_tokenizer ({OFFLINE!r} builds it offline); "
        "the tokenizer of another base model needs template.tokenization separate or chat"
    )
    num_units = 0
    while tokenizer.token_to_id(unit_token(num_units)) == UNIT_0 + num_units:
        num_units += 1
    expected = {"<unk>": UNK, "<s>": BOS, "</s>": EOS, CONTINUE_TOKEN: CONTINUE, CORRESPOND_TOKEN: CORRESPOND}
    expected |= {unit_token(0): UNIT_0, "<pad>": UNIT_0 + num_units}
    for token, token_id in expected.items():
        if (found := tokenizer.token_to_id(token)) != token_id:
            raise ValueError(f"{name} is not USTM's tokenizer: {token} has id {found} instead of {token_id}; {remedy}")
    for text, expected_ids, meaning in _PROBES:
        found_ids = tokenizer.encode(text, add_special_tokens=False).ids
        if found_ids != expected_ids:
            raise ValueError(
                f"{name} gives {found_ids[:20]} for {text!r} instead of {expected_ids}: {meaning}; {remedy}"
            )
    return ustm_tokens(num_units)


def ustm_tokens(num_units: int = NUM_UNITS) -> TemplateTokens:
    """The ids of the template in USTM's tokenizer."""
    return TemplateTokens((BOS,), (EOS,), NEWLINE, (SPACE, NEWLINE), CORRESPOND, CONTINUE, UNIT_0, num_units)


def build_tokenizer(
    base: str | Path = OFFLINE, num_units: int = NUM_UNITS, *, model_cache_dir: str | Path | None = None
) -> PreTrainedTokenizerFast:
    """Give the tokenizer of a base model the tokens for units: `<|correspond|>`, `<|continue|>` and `<|unit0|>`, `<|unit1|>`, ...

    The new tokens follow those of the base model; its own ids stay as they are. Encode with the template
    `Template(tokenization="separate")`.

    Args:
        base: A folder or a Hub repository with a tokenizer.json. By default "mistral-common" for USTM's tokenizer, which is built
            offline from the package mistral-common. It equals naver-ai/USTM as transformers 4.40.2 saves it, including the order
            of merges (transformers 5 converts the same model to 29,609 merges at other ranks).
        num_units: Number of units.
        model_cache_dir: Folder for downloads; the Hub's own cache by default.

    Raises:
        ImportError: mistral-common or sentencepiece is not installed.
        OSError: The base cannot be found or downloaded.
        ValueError: num_units is out of range, the base cannot be opened or has one of the new tokens already, or the model in
            mistral-common is not Mistral-7B-v0.1's.
    """
    if not 1 <= num_units <= MAX_UNITS:
        raise ValueError(f"num_units is {num_units}: give a number from 1 to {MAX_UNITS}")
    if str(base) != OFFLINE:
        opened = _open_tokenizer(str(base), None, {"cache_dir": model_cache_dir, "repo_type": "model"})
        if not Path(base).expanduser().is_dir():  # paths stay private
            opened.init_kwargs[_BASE_MODEL] = str(base)
        with naming_errors(str(base)):
            return add_units(opened, num_units, str(base))
    try:
        import sentencepiece  # an optional dependency, like mistral-common

        model = (importlib.resources.files("mistral_common") / "data" / "tokenizer.model.v1").read_bytes()
    except (ImportError, FileNotFoundError) as error:
        raise ImportError(
            f"the offline tokenizer needs mistral-common and sentencepiece ({error}): pip install 'dailytalk-usdm[demo]'"
        ) from error
    if (sha256 := hashlib.sha256(model).hexdigest()) != MODEL_SHA256:
        raise ValueError(
            f"mistral-common's tokenizer.model.v1 has sha256 {sha256}, not {MODEL_SHA256}: install another release of it"
        )
    from transformers import PreTrainedTokenizerFast

    backend = _legacy_tokenizer(sentencepiece.SentencePieceProcessor(model_proto=model), num_units)
    check_tokenizer(backend, "the tokenizer built from mistral-common")
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def _legacy_tokenizer(processor: SentencePieceProcessor, num_units: int) -> Tokenizer:
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    ids = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for i, piece in enumerate(pieces):
        score = 0.0 if i in (UNK, BOS, EOS) else processor.get_score(i)
        halves = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
        splits = [(ids[left], ids[right]) for left, right in halves if left in ids and right in ids]
        merges += [(score, left, right) for left, right in sorted(splits)]
    merges.sort(key=lambda merge: -merge[0])  # stable: merges of equal score keep their order

    tokenizer = Tokenizer(
        models.BPE(
            vocab=ids,
            merges=[(pieces[left], pieces[right]) for _, left, right in merges],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", BOS)]
    )
    units = [unit_token(unit) for unit in range(num_units)]
    added = ["<unk>", "<s>", "</s>", CONTINUE_TOKEN, CORRESPOND_TOKEN, *units, "<pad>"]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in added])
    return tokenizer


def read_base_model(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """Return the repository of the model whose tokenizer got the units, where `build_tokenizer` has recorded it."""
    name = tokenizer.init_kwargs.get(_BASE_MODEL)
    return name if isinstance(name, str) and _REPOSITORY.fullmatch(name) else None


def describe_tokenizer(
    name_or_path: str | Path, tokens: TemplateTokens, chat: ChatIds | None = None, base_model: str | None = None
) -> dict[str, Any]:
    """Describe a tokenizer.

    Args:
        name_or_path: The argument of `load_tokenizer`.
        tokens: Its ids of the template.
        chat: Those of its chat template, where this is used.
        base_model: Its base model, as `read_base_model` returns it.

    Returns:
        JSON values: `name` (None for a folder, because paths stay private), `num_units`, `ids` where `tokens` are not USTM's, and `chat`
        and `base_model` where they are given.
    """
    is_folder = str(name_or_path) != OFFLINE and Path(name_or_path).expanduser().is_dir()
    ids: dict[str, Any] = {} if tokens == ustm_tokens(tokens.num_units) else {"ids": tokens._asdict()}
    if chat is not None:
        ids["chat"] = chat.frames._asdict() | {"stop_id": chat.stop_id}
    if base_model is not None:
        ids["base_model"] = base_model
    return {"name": None if is_folder else str(name_or_path), "num_units": tokens.num_units, **ids}


def _open_tokenizer(
    name_or_path: str, subfolder: str | None, hub: dict[str, Any], *, instead: str = ""
) -> PreTrainedTokenizerFast:
    """Open tokenizer.json as it is.

    Args:
        name_or_path: The argument of `load_tokenizer`, as well as `subfolder`.
        hub: The arguments of `hf_hub_download`.
        instead: The last remedy of errors; "" where USTM's tokenizer cannot take its place.

    Raises:
        OSError, ValueError: As `load_tokenizer`.
    """
    name_or_path = os.path.expanduser(name_or_path)
    place = f"{name_or_path}/{subfolder}" if subfolder else name_or_path
    options: dict[str, Any] = {"revision": hub.get("revision") or "main", "token": hub.get("token")}
    with hub_errors(
        name_or_path,
        hub.get("revision"),
        repo_type=hub["repo_type"],
        intro=f"tokenizer {name_or_path} is not a folder, and ",
        outro=instead and f"; {instead.removeprefix(', ')}, which is built offline",
    ):
        if not Path(name_or_path).is_dir():
            file = f"{subfolder}/tokenizer.json" if subfolder else "tokenizer.json"
            where = {"revision": hub.get("revision"), "cache_dir": hub["cache_dir"]}
            cached = only_cached(name_or_path, file, hub["repo_type"], **where)
            hub, options = hub | cached, options | {"local_files_only": False} | cached
        source = _find_source(name_or_path, subfolder, hub)
        from transformers import PreTrainedTokenizerFast

        try:
            with naming_errors(place, instead):
                tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(
                    source, cache_dir=hub["cache_dir"], **options
                )
            if "local_files_only" in options:
                tokenizer.init_kwargs["local_files_only"] = False  # saved with the tokenizer, offline as online
        except OSError:
            raise
        except Exception as error:  # transformers and tokenizers raise many types for a malformed file
            for each in sorted(Path(source).glob("*.json")):
                if each.is_file() and is_html(each):
                    raise ValueError(f"{describe_bad_json(each, error)}: download it again{instead}") from error
            raise ValueError(
                f"{place} has a tokenizer that cannot be opened ({first_line(error)}): download it again{instead}"
            ) from error
    return tokenizer


def _find_source(name_or_path: str, subfolder: str | None, hub: dict[str, Any]) -> str:
    """Return what transformers opens: a folder, or the name of a model repository. It has no names for dataset repositories.

    A source without tokenizer.json is refused, because transformers would convert other files, to other ids.
    """
    folder = Path(name_or_path, subfolder or "")
    if Path(name_or_path).is_dir():
        if not (folder / "tokenizer.json").is_file():
            raise FileNotFoundError(f"{folder} has no tokenizer.json: name a folder with a fast tokenizer")
        return str(folder)
    try:
        hf_hub_download(name_or_path, "tokenizer.json", subfolder=subfolder, **hub)
    except LocalEntryNotFoundError:  # the Hub was not asked, or did not answer
        raise
    except EntryNotFoundError:
        where = f"folder {subfolder} of {name_or_path}" if subfolder else name_or_path
        raise FileNotFoundError(f"{where} on the Hub has no tokenizer.json: name one with a fast tokenizer") from None
    if subfolder is None and hub["repo_type"] == "model":
        return name_or_path
    files = [f"{subfolder}/{name}" if subfolder else name for name in ("*.json", "chat_template.jinja")]
    return str(Path(snapshot_download(name_or_path, allow_patterns=files, **hub), subfolder or ""))


def add_units(tokenizer: PreTrainedTokenizerFast, num_units: int, name: str) -> PreTrainedTokenizerFast:
    """Add `<|correspond|>`, `<|continue|>`, `<|unit0|>`, `<|unit1|>`, ... to a tokenizer, in place.

    The new tokens get the ids after the tokenizer's own, units last. A tokenizer without a padding token gets `<pad>` before them, and
    one in which a newline is not one id, as in WordPiece, a token for it.

    Args:
        tokenizer: The tokenizer of a base model.
        num_units: Number of units.
        name: Its name in error messages.

    Raises:
        ValueError: The tokenizer has one of the new tokens already, or does not read them as one id each.
    """
    new = [CORRESPOND_TOKEN, CONTINUE_TOKEN, *map(unit_token, range(num_units))]
    for token in new[:3]:
        if (found := tokenizer.backend_tokenizer.token_to_id(token)) is not None:
            raise ValueError(f"{name} has the token {token} already (id {found}): name the tokenizer of a base model")
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": AddedToken("<pad>", normalized=False, special=True)})
    if find_newline(without_padding(tokenizer.backend_tokenizer)) is None:
        tokenizer.add_tokens([AddedToken("\n", normalized=False)])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in new], special_tokens=True)
    read_tokens(tokenizer, name)
    return tokenizer
