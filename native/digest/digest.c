/*
 * digest.c - the algorithms of checksums: SHA-256 by OpenSSL, BLAKE3 by its library, CRC-32C
 *
 * Both libraries choose the CPU's instructions (SHA-NI, AVX-512, NEON) at run time.
 */
#include "digest/digest.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include <openssl/evp.h>
#ifdef IMGC_HAVE_BLAKE3
#include <blake3.h>
#endif

#include "common/checked.h"
#include "common/endian.h"

#define MAX_COPY_NBYTES (16u * 1024) /* so that what is copied stays in the L1 cache */

struct imgc_digest {
	const struct algorithm *algorithm;
	union {
		EVP_MD_CTX *evp;
		struct {
			uint32_t value, variant;
		} crc;
#ifdef IMGC_HAVE_BLAKE3
		blake3_hasher blake3;
#endif
	} state;
};

/* `create` is NULL if the algorithm is not built in, and then so are the others. */
struct algorithm {
	const char *name;
	int (*create)(struct imgc_digest *d);
	void (*destroy)(struct imgc_digest *d);
	bool (*begin)(struct imgc_digest *d);
	bool (*add)(struct imgc_digest *d, const void *data, size_t nbytes);
	bool (*end)(struct imgc_digest *d, uint8_t *out);
	bool (*copy)(struct imgc_digest *to, const struct imgc_digest *from);
};

/* ------------------------------------------------------------------ SHA-256 */

/*
 * The context keeps the algorithm, so that it is looked up once.  The first look-up of a
 * process initialises OpenSSL.
 */
static int sha256_create(struct imgc_digest *d)
{
	EVP_MD *md = EVP_MD_fetch(NULL, "SHA2-256", NULL);
	int status = md ? IMGC_OK : IMGC_UNSUPPORTED;

	if (md) {
		d->state.evp = EVP_MD_CTX_new();
		if (!d->state.evp || !EVP_DigestInit_ex2(d->state.evp, md, NULL))
			status = IMGC_NO_MEMORY;
	}
	EVP_MD_free(md);
	return status;
}

static void sha256_destroy(struct imgc_digest *d)
{
	EVP_MD_CTX_free(d->state.evp);
}

static bool sha256_begin(struct imgc_digest *d)
{
	return EVP_DigestInit_ex2(d->state.evp, NULL, NULL);
}

static bool sha256_add(struct imgc_digest *d, const void *data, size_t nbytes)
{
	return EVP_DigestUpdate(d->state.evp, data, nbytes);
}

static bool sha256_end(struct imgc_digest *d, uint8_t *out)
{
	return EVP_DigestFinal_ex(d->state.evp, out, NULL);
}

static bool sha256_copy(struct imgc_digest *to, const struct imgc_digest *from)
{
	return EVP_MD_CTX_copy_ex(to->state.evp, from->state.evp);
}

/* ------------------------------------------------------------------- BLAKE3 */

#ifdef IMGC_HAVE_BLAKE3
static int blake3_create(struct imgc_digest *d)
{
	blake3_hasher_init(&d->state.blake3);
	return IMGC_OK;
}

static void blake3_destroy(struct imgc_digest *d)
{
	(void)d;
}

static bool blake3_begin(struct imgc_digest *d)
{
	blake3_hasher_reset(&d->state.blake3);
	return true;
}

static bool blake3_add(struct imgc_digest *d, const void *data, size_t nbytes)
{
	blake3_hasher_update(&d->state.blake3, data, nbytes);
	return true;
}

static bool blake3_end(struct imgc_digest *d, uint8_t *out)
{
	blake3_hasher_finalize(&d->state.blake3, out, IMGC_CHECKSUM_NBYTES);
	return true;
}

static bool blake3_copy(struct imgc_digest *to, const struct imgc_digest *from)
{
	to->state.blake3 = from->state.blake3;
	return true;
}
#endif

/* ------------------------------------------------------------------- CRC-32C */

static int crc32c_create(struct imgc_digest *d)
{
	int found = imgc_variant_select(IMGC_OP_CRC32C, NULL, &d->state.crc.variant);

	return found == IMGC_SELECT_OK ? IMGC_OK : IMGC_UNSUPPORTED;
}

static void crc32c_destroy(struct imgc_digest *d)
{
	(void)d;
}

static bool crc32c_begin(struct imgc_digest *d)
{
	d->state.crc.value = 0;
	return true;
}

static bool crc32c_add(struct imgc_digest *d, const void *data, size_t nbytes)
{
	d->state.crc.value = imgc_crc32c(d->state.crc.variant, d->state.crc.value, data, nbytes);
	return true;
}

static bool crc32c_end(struct imgc_digest *d, uint8_t *out)
{
	memset(out, 0, IMGC_CHECKSUM_NBYTES);
	imgc_store_le32(out, d->state.crc.value);
	return true;
}

static bool crc32c_copy(struct imgc_digest *to, const struct imgc_digest *from)
{
	to->state.crc = from->state.crc;
	return true;
}

/* -------------------------------------------------------------------- table */

static const struct algorithm algorithms[IMGC_N_CHECKSUMS] = {
	[IMGC_CHECKSUM_SHA256] = {"sha256", sha256_create, sha256_destroy, sha256_begin, sha256_add,
				  sha256_end, sha256_copy},
#ifdef IMGC_HAVE_BLAKE3
	[IMGC_CHECKSUM_BLAKE3] = {"blake3", blake3_create, blake3_destroy, blake3_begin, blake3_add,
				  blake3_end, blake3_copy},
#else
	[IMGC_CHECKSUM_BLAKE3] = {.name = "blake3"},
#endif
	[IMGC_CHECKSUM_CRC32C] = {"crc32c", crc32c_create, crc32c_destroy, crc32c_begin, crc32c_add,
				  crc32c_end, crc32c_copy},
};

const char *imgc_checksum_name(unsigned checksum)
{
	return checksum < IMGC_N_CHECKSUMS ? algorithms[checksum].name : NULL;
}

int imgc_checksum_is_built(unsigned checksum)
{
	return checksum < IMGC_N_CHECKSUMS && algorithms[checksum].create;
}

int imgc_digest_create(uint32_t checksum, struct imgc_digest **out)
{
	if (!imgc_checksum_is_built(checksum))
		return IMGC_UNSUPPORTED;
	struct imgc_digest *d = calloc(1, sizeof(*d));

	if (!d)
		return IMGC_NO_MEMORY;
	d->algorithm = &algorithms[checksum];
	int status = d->algorithm->create(d);

	if (status) {
		imgc_digest_destroy(d);
		return status;
	}
	*out = d;
	return IMGC_OK;
}

void imgc_digest_destroy(struct imgc_digest *digest)
{
	if (digest)
		digest->algorithm->destroy(digest);
	free(digest);
}

/* The libraries fail only where memory is short. */
static int status_of(bool succeeded)
{
	return succeeded ? IMGC_OK : IMGC_NO_MEMORY;
}

int imgc_digest_begin(struct imgc_digest *digest)
{
	return status_of(digest->algorithm->begin(digest));
}

int imgc_digest_add(struct imgc_digest *digest, const void *data, size_t nbytes)
{
	return status_of(digest->algorithm->add(digest, data, nbytes));
}

int imgc_digest_end(struct imgc_digest *digest, uint8_t out[IMGC_CHECKSUM_NBYTES])
{
	return status_of(digest->algorithm->end(digest, out));
}

int imgc_digest_copy(struct imgc_digest *to, const struct imgc_digest *from)
{
	return status_of(to->algorithm->copy(to, from));
}

int imgc_digest_of(struct imgc_digest *digest, const void *data, size_t nbytes,
		   uint8_t out[IMGC_CHECKSUM_NBYTES])
{
	int status = imgc_digest_begin(digest);

	if (status == IMGC_OK)
		status = imgc_digest_add(digest, data, nbytes);
	return status ? status : imgc_digest_end(digest, out);
}

int imgc_digest_of_zeros(struct imgc_digest *digest, size_t nbytes,
			 uint8_t out[IMGC_CHECKSUM_NBYTES])
{
	static const uint8_t zeros[1024];
	int status = imgc_digest_begin(digest);

	while (nbytes > 0 && status == IMGC_OK) {
		size_t n = imgc_min_u64(nbytes, sizeof(zeros));

		status = imgc_digest_add(digest, zeros, n);
		nbytes -= n;
	}
	return status ? status : imgc_digest_end(digest, out);
}

void imgc_leaves_fill(uint8_t *leaves, size_t n, const uint8_t leaf[IMGC_CHECKSUM_NBYTES])
{
	size_t done = IMGC_CHECKSUM_NBYTES, nbytes = n * IMGC_CHECKSUM_NBYTES;

	if (n == 0)
		return;
	memmove(leaves, leaf, done);
	while (done < nbytes) {
		size_t more = imgc_min_u64(imgc_min_u64(done, MAX_COPY_NBYTES), nbytes - done);

		memcpy(leaves + done, leaves, more);
		done += more;
	}
}
