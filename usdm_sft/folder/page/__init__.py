"""One self-contained HTML page of examples: text, units, labels and sound."""

from usdm_sft.folder.page.write import write_page

__all__ = ["write_page"]
