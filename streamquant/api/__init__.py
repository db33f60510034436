"""The functions of `import streamquant`, a file for each room; the package loads them when they are used."""
