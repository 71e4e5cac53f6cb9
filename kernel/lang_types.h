/* SPDX-License-Identifier: MIT */
/*
 * Integer types of the kernel language, for compilers with and without a C library. Nothing else:
 * abi.h needs these on both sides.
 */
#ifndef KERNEL_LANG_TYPES_H
#define KERNEL_LANG_TYPES_H

typedef unsigned char k_u8;
typedef unsigned short k_u16;
typedef unsigned int k_u32;
typedef unsigned long long k_u64;
typedef int k_i32;
typedef long long k_i64;
typedef float k_f32;

#if defined(__CUDACC__) && !defined(_Static_assert)
#define _Static_assert static_assert
#endif

#define K_BF16 1 /* the values of ep_dtype */
#define K_F16 2
#define K_F32 3

#endif
