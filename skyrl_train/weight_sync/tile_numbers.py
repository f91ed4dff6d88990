"""The numbers of SGLang's hash of a tensor by tiles; two halves of 32 bits are computed side by side."""

RUN = 8192
SEED = 0x243F6A88
SEEDS = (SEED, ((SEED * 0x9E3779B1) ^ 0xDEADBEEF) & 0xFFFFFFFF)
PLACE = (0x27D4EB2D, 0x165667B1)
TURN = (15, 13)
MIX = (0x85EBCA6B, 0xC2B2AE35)
