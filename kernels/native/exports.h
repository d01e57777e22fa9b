// What the library offers to its callers; everything else stays hidden.

#pragma once

#define PINRANK_API extern "C" __attribute__((visibility("default")))
