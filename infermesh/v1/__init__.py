"""Generated from protos/infermesh/v1 by `make protos`; never edited by hand."""
