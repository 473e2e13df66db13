"""The commands `export` and `push`."""

from __future__ import annotations

from typing import Literal

from usdm_sft.utils.texts import count_noun


def export(
    dataset_dir: str,
    output_dir: str,
    format: Literal["usdm", "arrow", "megatron"] = "usdm",
    num_proc: int | None = None,
) -> None:
    """Write the ids and labels of a dataset folder in the format of another trainer.

    Examples:
        dailytalk-usdm export dailytalk-usdm-data preprocessed

    Args:
        dataset_dir: A folder that prepare made.
        output_dir: Where the files go. usdm and megatron replace files of the same names; arrow needs an empty folder.
        format: usdm writes train.txt and test.txt as train_sft.py of naver-ai/usdm reads them; arrow a folder for tokenized_path of
            LLaMA-Factory; megatron packed Parquet files for Megatron-Bridge.
        num_proc: Largest number of processes. By default one per core that this process may use; a small folder needs none.
    """
    from usdm_sft.folder import export as exporting

    for split, num_rows in exporting.export(dataset_dir, output_dir, format=format, num_proc=num_proc).items():
        print(
            f"{split}.txt: {count_noun(num_rows, 'line')}"
            if format == "usdm"
            else f"{split}: {count_noun(num_rows, 'row')}"
        )


def push(
    dataset_dir: str,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> None:
    """Verify a dataset folder and upload it to the Hub in one commit.

    It needs `hf auth login` or HF_TOKEN; a token on the command line would stay in the history of the shell.

    Examples:
        dailytalk-usdm push dailytalk-usdm-data USER/NAME --private
        dailytalk-usdm push dailytalk-usdm-data USER/NAME --create_pr

    Args:
        dataset_dir: A folder that prepare made.
        repo_id: The dataset repository, USER/NAME. It is created where it does not exist.
        private: Create the repository private; an existing one must be private.
        revision: Branch, created where it does not exist. By default the main branch.
        commit_message: By default it names the config and the key of the folder.
        create_pr: Open a pull request to the branch, which must exist.
    """
    from usdm_sft.folder.push import push

    url = push(
        dataset_dir,
        repo_id,
        private=private,
        revision=revision,
        commit_message=commit_message,
        create_pr=create_pr,
    )
    print(url)
    if not create_pr:
        print(f"load_dataset({repo_id!r}) opens it")
