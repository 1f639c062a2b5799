//! Integration tests: one binary.

mod alloc;
mod bags;
mod cdr;
mod cli;
mod datasets;
mod faults;
mod layers;
mod loaders;
mod maps;
mod mutations;
mod real;
mod rerank;
mod support;
