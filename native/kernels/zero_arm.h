/*
 * zero_arm.h - the NEON variant of zero.c; every aarch64 CPU has it
 */
#include <arm_neon.h>

static int zero_neon(const uint8_t *p, size_t nbytes)
{
	if (nbytes < 16)
		return zero_portable(p, nbytes);
	const uint8_t *last = p + nbytes - 16;
	uint8x16_t v = vld1q_u8(p);

	if (vmaxvq_u8(v) != 0)
		return 0;
	for (; nbytes >= 64; p += 64, nbytes -= 64) {
		v = vorrq_u8(vorrq_u8(vld1q_u8(p), vld1q_u8(p + 16)),
			     vorrq_u8(vld1q_u8(p + 32), vld1q_u8(p + 48)));
		if (vmaxvq_u8(v) != 0)
			return 0;
	}
	v = vld1q_u8(last);
	for (; nbytes >= 16; p += 16, nbytes -= 16)
		v = vorrq_u8(v, vld1q_u8(p));
	return vmaxvq_u8(v) == 0;
}
