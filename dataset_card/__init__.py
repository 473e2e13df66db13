"""What `usdm_sft.card` and `usdm_sft.view` fill: the dataset card, and the page of examples."""
