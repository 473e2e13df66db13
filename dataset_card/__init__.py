"""Templates of the dataset card (`usdm_sft.dataset_folder.card`) and of the page of examples (`usdm_sft.dataset_folder.page`)."""
