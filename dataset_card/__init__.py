"""The template of the dataset card, which `usdm_sft.folder` fills from the counts."""
