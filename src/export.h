/* SPDX-License-Identifier: MIT */
/*
 * Put before every file of src/ by the Makefile (-include): the library is compiled with hidden
 * visibility, and what ep.h declares is the exception. This keeps the public header free of
 * export macros. Nothing includes this file by hand.
 */
#pragma GCC visibility push(default)
#include "ep.h"
#pragma GCC visibility pop
