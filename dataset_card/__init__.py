"""Templates of the dataset card (`usdm_sft.folder.card`) and of the page of examples (`usdm_sft.folder.page`)."""
