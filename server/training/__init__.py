"""One trainer for both uses: multi-task pre-training of an inventory and few-shot adaptation of a task."""
