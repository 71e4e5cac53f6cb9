/* SPDX-License-Identifier: MIT */
/* class: rest */
/*
 * SHA-256 and HMAC-SHA-256 give the published values (FIPS 180-4's examples, RFC 4231), whatever the
 * pieces in which the data comes; and equality of bytes is found out.
 */
#include <stdio.h>
#include <string.h>

#include "src/base/base.h"
#include "tests/gpu.h"
#include "tests/tap.h"

static void to_hex(const uint8_t bytes[EPI_SHA256_BYTES], char out[65]) {
    for (int i = 0; i < EPI_SHA256_BYTES; i++) {
        snprintf(out + 2 * i, 3, "%02x", bytes[i]);
    }
}

static void test_hash(void) {
    static const char *const vectors[][2] = {
        {"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
        {"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
        {"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
         "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"},
        {"abcdefghbcdefghicdefghijdefghijkefghijklfghijklmghijklmnhijklmnoijklmnopjklmnopqklmn"
         "opqrlmnopqrsmnopqrstnopqrstu",
         "cf5b16a778af8380036ce59e7b0492370b249b11e8f07a51afac45037afee9d1"}};
    uint8_t out[EPI_SHA256_BYTES];
    char hex[65];
    struct epi_sha256 s;
    for (size_t i = 0; i < sizeof(vectors) / sizeof(vectors[0]); i++) {
        const char *text = vectors[i][0];
        for (size_t piece = 1; piece <= strlen(text) + 1; piece++) {
            epi_sha256_begin(&s);
            for (size_t at = 0; at < strlen(text); at += piece) {
                size_t left = strlen(text) - at;
                epi_sha256_add(&s, text + at, piece < left ? piece : left);
            }
            epi_sha256_end(&s, out);
            to_hex(out, hex);
            ok(strcmp(hex, vectors[i][1]) == 0, "%zu bytes in pieces of %zu", strlen(text),
               piece);
        }
    }
    epi_sha256_begin(&s);
    for (int i = 0; i < 10000; i++) {
        static const char many[101] = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
                                      "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
        epi_sha256_add(&s, many, 100);
    }
    epi_sha256_end(&s, out);
    to_hex(out, hex);
    ok(strcmp(hex, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0") == 0,
       "a million bytes");
}

static void test_hmac(void) {
    static const char large_key[] = "Test Using Larger Than Block-Size Key - Hash Key First";
    static const char large_both[] =
        "This is a test using a larger than block-size key and a larger than block-size data. "
        "The key needs to be hashed before being used by the HMAC algorithm.";
    uint8_t key[7][131];
    uint8_t dd[50];
    uint8_t cd[50];
    memset(key[0], 0x0b, 20);
    memset(key[2], 0xaa, 20);
    for (int i = 0; i < 25; i++) {
        key[3][i] = (uint8_t)(i + 1);
    }
    memset(key[4], 0x0c, 20);
    memset(key[5], 0xaa, 131);
    memset(dd, 0xdd, sizeof(dd));
    memset(cd, 0xcd, sizeof(cd));
    /* RFC 4231, test cases 1 to 7; of the fifth only 128 bits are published. */
    const struct {
        const void *key;
        size_t key_bytes;
        const void *data;
        size_t bytes;
        const char *hex;
    } vectors[] = {{key[0], 20, "Hi There", 8,
                    "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7"},
                   {"Jefe", 4, "what do ya want for nothing?", 28,
                    "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"},
                   {key[2], 20, dd, 50,
                    "773ea91e36800e46854db8ebd09181a72959098b3ef8c122d9635514ced565fe"},
                   {key[3], 25, cd, 50,
                    "82558a389a443c0ea4cc819899f2083a85f0faa3e578f8077a2e3ff46729665b"},
                   {key[4], 20, "Test With Truncation", 20, "a3b6167473100ee06e0c796c2955552b"},
                   {key[5], 131, large_key, sizeof(large_key) - 1,
                    "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54"},
                   {key[5], 131, large_both, sizeof(large_both) - 1,
                    "9b09ffa71b942fcb27635fbcd5b0e944bfdc63644f0713938a7f51535c3a35e2"}};
    for (size_t i = 0; i < sizeof(vectors) / sizeof(vectors[0]); i++) {
        uint8_t out[EPI_SHA256_BYTES];
        char hex[65];
        struct epi_hmac h;
        epi_hmac_begin(&h, vectors[i].key, vectors[i].key_bytes);
        epi_hmac_add(&h, vectors[i].data, 3);
        epi_hmac_add(&h, (const uint8_t *)vectors[i].data + 3, vectors[i].bytes - 3);
        epi_hmac_end(&h, out);
        to_hex(out, hex);
        ok(strncmp(hex, vectors[i].hex, strlen(vectors[i].hex)) == 0, "RFC 4231, case %zu",
           i + 1);
    }
}

static void test_same(void) {
    uint8_t a[32] = {0};
    uint8_t b[32] = {0};
    bool right = epi_same_bytes(a, b, sizeof(a));
    for (size_t i = 0; i < sizeof(a); i++) {
        b[i] = 0x80;
        right = right && !epi_same_bytes(a, b, sizeof(a)) && epi_same_bytes(a, b, i);
        b[i] = 0;
    }
    ok(right, "bytes are the same or not");
}

int main(void) {
    gpu_never("a hash");
    tap_deadline(30);
    test_hash();
    test_hmac();
    test_same();
    return done_testing();
}
