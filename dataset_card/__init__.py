"""What `usdm_sft.dataset_folder.card` and `usdm_sft.template.view` fill: the dataset card, and the page of examples."""
