"""DailyTalk as training data for spoken-dialog language models; `import dailytalk_usdm` re-exports the public names."""

__version__ = "0.1.0"
