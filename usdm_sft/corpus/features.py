"""Columns of the datasets, as `datasets.Features`."""

import datasets


class StoredAudio(datasets.Audio):
    """`Audio(decode=False)` that is also written without decoding.

    datasets 4 and later import torchcodec (and with it FFmpeg) merely to store an audio file, and drop bytes whose path
    exists. Here `{"bytes", "path"}` goes into Arrow as it is; on disk and on the Hub it is plain `Audio`.
    """

    def __init__(self):
        super().__init__(decode=False)

    def encode_example(self, value: dict) -> dict:
        return {"bytes": value["bytes"], "path": value["path"]}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, datasets.Audio) and not other.decode

    __hash__ = None


def example_features(*, lists: bool) -> datasets.Features:
    """One example a row; `id` is the dialog and the user's turn, such as "d23_0".

    Args:
        lists: The user and agent columns hold lists, one entry an exchange.
    """
    columns = {"id": datasets.Value("string"), "dialog_id": datasets.Value("string"), "turn": datasets.Value("int32")}
    for role in ("user", "agent"):
        its_columns = {
            f"{role}_speaker": datasets.Value("string"),
            f"{role}_text": datasets.Value("string"),
            f"{role}_emotion": datasets.Value("string"),
            f"{role}_audio": StoredAudio(),
        }
        # Sequence is the spelling that datasets 3 and 5 share; 5 makes List of it.
        columns |= {name: datasets.Sequence(value) if lists else value for name, value in its_columns.items()}
    return datasets.Features(columns)
