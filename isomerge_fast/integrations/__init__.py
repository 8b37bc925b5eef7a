"""What plugs into other tools: mergekit, FusionBench, PEFT. Nothing else in the package imports these."""
