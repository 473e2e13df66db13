from usdm_sft.cli.main import main

main()
