"""A Job with `stream` -> Report: a model whose weights are streamed, from what is asked (`command`) to the child that does it (`session`)."""
