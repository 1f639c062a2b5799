//! Integration tests: one binary.

mod alloc;
mod bags;
mod cdr;
mod cli;
mod datasets;
mod layers;
mod loaders;
mod real;
mod rerank;
mod support;
